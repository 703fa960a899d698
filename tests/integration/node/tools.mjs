// What clients make of answers for which a model called tools, its own one and the proxy's. Reads a
// line of JSON for each conversation ({ client, url, prompts, stream }), and writes its answers as
// one: each is text, thinking, calls (name, arguments), tokens (read, written) and how it ended.

import { createInterface } from "node:readline";
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { ToolMessage } from "@langchain/core/messages";
import { ChatOllama } from "@langchain/ollama";
import { ChatOpenAI } from "@langchain/openai";
import { generateText, isStepCount, jsonSchema, streamText, tool } from "ai";
import { createOllama } from "ai-sdk-ollama";
import { Ollama } from "ollama";

const [OWN, SET, model, apiKey] = ["alarm", "alarm is set", "m", "none"];
const SCHEMA = { type: "object", properties: { z: { type: "string" } }, required: ["z"] };
const TOOL = { type: "function", function: { name: OWN, description: "", parameters: SCHEMA } };
globalThis.AI_SDK_LOG_WARNINGS = false;

const models = {
  ollama: (host) => new Ollama({ host }),
  "ai-sdk-ollama": (baseURL) => createOllama({ baseURL })(model, { think: true }),
  "@ai-sdk/openai-compatible": (url) =>
    createOpenAICompatible({ name: "x", baseURL: `${url}/v1`, includeUsage: true })(model),
  "@ai-sdk/openai": (url) => createOpenAI({ baseURL: `${url}/v1`, apiKey })(model),
  "@ai-sdk/anthropic": (url) => createAnthropic({ baseURL: `${url}/v1`, apiKey })(model),
  "@langchain/ollama": (baseUrl) => new ChatOllama({ model, baseUrl, think: true }),
  "@langchain/openai": (url) => openAIOfLangChain(url, false),
  "@langchain/openai responses": (url) => openAIOfLangChain(url, true),
};

function openAIOfLangChain(url, useResponsesApi) {
  const configuration = { baseURL: `${url}/v1` };
  return new ChatOpenAI({ model, apiKey, configuration, useResponsesApi });
}

// Each of these asks once (the AI SDK until its tool is called no more), adds the answer to the
// history as its users do, and returns answers, and messages with the results of its tool.

async function askOllama(ollama, messages, stream) {
  const asked = { model, messages, tools: [TOOL] };
  const parts = stream
    ? await all(await ollama.chat({ ...asked, stream }))
    : [await ollama.chat(asked)];
  const [text, thinking] = ["content", "thinking"].map((key) =>
    parts.map((part) => part.message[key] ?? "").join(""),
  );
  const tool_calls = parts.flatMap((part) => part.message.tool_calls ?? []);
  messages.push({ role: "assistant", content: text, thinking, tool_calls });
  const { prompt_eval_count, eval_count, done_reason: finish } = parts.at(-1);
  const calls = tool_calls.map((call) => [call.function.name, call.function.arguments]);
  const answer = [text, thinking, calls, [prompt_eval_count, eval_count], finish];
  return [[answer], calls.map(([tool_name]) => ({ role: "tool", content: SET, tool_name }))];
}

async function askAI(model, messages, stream) {
  const tools = { [OWN]: tool({ inputSchema: jsonSchema(SCHEMA), execute: async () => SET }) };
  const asked = { model, messages, tools, stopWhen: isStepCount(9), maxRetries: 0 };
  // Without `store` it would refer to what the server keeps, and Ollama keeps nothing
  const options = { maxOutputTokens: 999, providerOptions: { openai: { store: false } } };
  const result = await (stream ? streamText : generateText)({ ...asked, ...options });
  for (const part of stream ? await all(result.fullStream) : [])
    if (part.type === "error") throw part.error;
  messages.push(...(await result.response).messages);
  const answers = (await result.steps).map((step) => [
    step.text,
    step.reasoningText ?? "",
    step.toolCalls.map((call) => [call.toolName, call.input]),
    [step.usage.inputTokens, step.usage.outputTokens],
    step.finishReason,
  ]);
  return [answers, []];
}

async function askLangChain(model, messages, stream) {
  const bound = model.bindTools([TOOL]);
  const message = stream
    ? (await all(await bound.stream(messages))).reduce((joined, part) => joined.concat(part))
    : await bound.invoke(messages);
  messages.push(message);
  const { response_metadata: meta, usage_metadata: usage } = message;
  const answer = [
    message.text,
    message.additional_kwargs.reasoning_content ?? "",
    message.tool_calls.map((call) => [call.name, call.args]),
    [usage?.input_tokens, usage?.output_tokens],
    meta.done_reason ?? meta.finish_reason ?? meta.status,
  ];
  return [[answer], message.tool_calls.map((call) => new ToolMessage(SET, call.id, call.name))];
}

async function all(stream) {
  const parts = [];
  for await (const part of stream) parts.push(part);
  return parts;
}

async function converse({ client, url, prompts, stream }) {
  const ask = client === "ollama" ? askOllama : client.startsWith("@l") ? askLangChain : askAI;
  const [model, messages, told] = [models[client](url), [], []];
  for (const content of prompts) {
    for (let more = [{ role: "user", content }]; more.length;) {
      messages.push(...more);
      const [answers, results] = await ask(model, messages, stream);
      told.push(...answers);
      more = results;
    }
  }
  return told;
}

for await (const line of createInterface({ input: process.stdin })) {
  const told = await converse(JSON.parse(line)).catch((error) => error.stack);
  console.log(JSON.stringify(told));
}
