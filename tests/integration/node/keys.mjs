// What Node packages make of a server that wants a key. Reads [url, [[key, model, prompt], ...]] and
// writes for each package what came of its questions: the text of an answer, or a ! and what the
// error says.

import { readFileSync } from "node:fs";
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import Anthropic from "@anthropic-ai/sdk";
import { ChatOllama } from "@langchain/ollama";
import { ChatOpenAI } from "@langchain/openai";
import { generateText } from "ai";
import { createOllama } from "ai-sdk-ollama";
import { createOllama as createOllamaV2 } from "ollama-ai-provider-v2";
import { Ollama } from "ollama";
import OpenAI from "openai";

globalThis.AI_SDK_LOG_WARNINGS = false;
const bearer = (key) => ({ Authorization: `Bearer ${key}` });
const said = (content) => [{ role: "user", content }];
const ai = async (model, prompt) => (await generateText({ model, prompt, maxRetries: 0 })).text;

const clients = {
  ollama: async (host, key, model, prompt) => {
    const ollama = new Ollama({ host, headers: bearer(key) });
    return (await ollama.chat({ model, messages: said(prompt) })).message.content;
  },
  openai: async (url, apiKey, model, prompt) => {
    const openai = new OpenAI({ baseURL: `${url}/v1`, apiKey });
    const answer = await openai.chat.completions.create({ model, messages: said(prompt) });
    return answer.choices[0].message.content;
  },
  "openai responses": async (url, apiKey, model, input) => {
    const openai = new OpenAI({ baseURL: `${url}/v1`, apiKey });
    return (await openai.responses.create({ model, input })).output_text;
  },
  "@anthropic-ai/sdk": async (baseURL, apiKey, model, prompt) => {
    const anthropic = new Anthropic({ baseURL, apiKey });
    const asked = { model, max_tokens: 999, messages: said(prompt) };
    return (await anthropic.messages.create(asked)).content[0].text;
  },
  "ai-sdk-ollama": (baseURL, apiKey, model, prompt) =>
    ai(createOllama({ baseURL, apiKey })(model), prompt),
  "ollama-ai-provider-v2": (url, key, model, prompt) =>
    ai(createOllamaV2({ baseURL: `${url}/api`, headers: bearer(key) })(model), prompt),
  "@ai-sdk/openai-compatible": (url, apiKey, model, prompt) =>
    ai(createOpenAICompatible({ name: "x", baseURL: `${url}/v1`, apiKey })(model), prompt),
  "@ai-sdk/openai": (url, apiKey, model, prompt) =>
    ai(createOpenAI({ baseURL: `${url}/v1`, apiKey })(model), prompt),
  "@ai-sdk/anthropic": (url, apiKey, model, prompt) =>
    ai(createAnthropic({ baseURL: `${url}/v1`, apiKey })(model), prompt),
  "@langchain/ollama": async (baseUrl, key, model, prompt) =>
    (await new ChatOllama({ model, baseUrl, headers: bearer(key) }).invoke(prompt)).text,
  "@langchain/openai": async (url, apiKey, model, prompt) => {
    const configuration = { baseURL: `${url}/v1` };
    return (await new ChatOpenAI({ model, apiKey, configuration }).invoke(prompt)).text;
  },
};

const [url, questions] = JSON.parse(readFileSync(0, "utf-8"));
const told = {};
for (const [name, ask] of Object.entries(clients)) {
  told[name] = [];
  for (const question of questions)
    told[name].push(await ask(url, ...question).catch((error) => `!${error.message}`));
}
console.log(JSON.stringify(told));
