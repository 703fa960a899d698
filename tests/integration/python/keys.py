# mypy: ignore-errors
"""What Python packages make of a server that wants a key.

Reads [url, [[key, model, prompt], ...]] and writes for each package what came of its questions: the
text of an answer, or a ! and what the error says.
"""

import json
import os
import sys

import litellm
from anthropic import Anthropic
from langchain_anthropic import ChatAnthropic
from langchain_ollama import ChatOllama
from langchain_openai import ChatOpenAI
from llama_index.llms.ollama import Ollama
from llama_index.llms.openai_like import OpenAILike
from ollama import Client
from openai import OpenAI
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.ollama import OllamaProvider

litellm.suppress_debug_info = True


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def user(prompt):
    return [{"role": "user", "content": prompt}]


def ask_ollama(url, key, model, prompt):
    return Client(url, headers=bearer(key)).chat(model, user(prompt)).message.content


def ask_ollama_by_environment(url, key, model, prompt):
    os.environ["OLLAMA_API_KEY"] = key
    try:
        return Client(url).chat(model, user(prompt)).message.content
    finally:
        del os.environ["OLLAMA_API_KEY"]


def ask_completions(url, key, model, prompt):
    chats = OpenAI(base_url=f"{url}/v1", api_key=key).chat.completions
    return chats.create(model=model, messages=user(prompt)).choices[0].message.content


def ask_responses(url, key, model, prompt):
    responses = OpenAI(base_url=f"{url}/v1", api_key=key).responses
    return responses.create(model=model, input=prompt).output_text


def ask_messages(url, model, prompt, **key):
    messages = Anthropic(base_url=url, **key).messages
    return messages.create(model=model, max_tokens=999, messages=user(prompt)).content[0].text


def ask_litellm(prefix, url, key, model, prompt):
    asked = {"model": f"{prefix}/{model}", "messages": user(prompt)}
    return litellm.completion(**asked, api_base=url, api_key=key).choices[0].message.content


def ask_pydantic_ai(url, key, model, prompt):
    provider = OllamaProvider(base_url=f"{url}/v1", api_key=key)
    return Agent(OpenAIChatModel(model, provider=provider)).run_sync(prompt).output


CLIENTS = {
    "ollama": ask_ollama,
    "ollama OLLAMA_API_KEY": ask_ollama_by_environment,
    "openai": ask_completions,
    "openai responses": ask_responses,
    "anthropic api_key": lambda u, k, m, p: ask_messages(u, m, p, api_key=k),
    "anthropic auth_token": lambda u, k, m, p: ask_messages(u, m, p, auth_token=k),
    "langchain-ollama": lambda u, k, m, p: (
        ChatOllama(base_url=u, model=m, client_kwargs={"headers": bearer(k)}).invoke(p).text
    ),
    "langchain-ollama URL": lambda u, k, m, p: (
        ChatOllama(base_url=u.replace("//", f"//x:{k}@"), model=m).invoke(p).text
    ),
    "langchain-openai": lambda u, k, m, p: (
        ChatOpenAI(base_url=f"{u}/v1", api_key=k, model=m).invoke(p).text
    ),
    "langchain-anthropic": lambda u, k, m, p: (
        ChatAnthropic(base_url=u, api_key=k, model=m).invoke(p).text
    ),
    "llama-index-llms-ollama": lambda u, k, m, p: (
        Ollama(model=m, base_url=u, headers=bearer(k)).complete(p).text
    ),
    "llama-index-llms-openai-like": lambda u, k, m, p: (
        OpenAILike(model=m, api_base=f"{u}/v1", api_key=k, is_chat_model=True).complete(p).text
    ),
    "litellm ollama_chat": lambda u, *rest: ask_litellm("ollama_chat", u, *rest),
    "litellm openai": lambda u, *rest: ask_litellm("openai", f"{u}/v1", *rest),
    "pydantic-ai": ask_pydantic_ai,
}


def ask(client, *question):
    try:
        return CLIENTS[client](*question)
    except Exception as exc:
        return f"!{exc}"


url, questions = json.load(sys.stdin)
told = {client: [ask(client, url, *question) for question in questions] for client in CLIENTS}
sys.stdout.write(json.dumps(told))
