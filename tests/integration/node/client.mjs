// What ollama-js and openai-js make of the server at the URL that is given, as one JSON object.

import { Ollama } from "ollama";
import OpenAI from "openai";

const url = process.argv[2];
const ollama = new Ollama({ host: url });
const openai = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });

const options = { temperature: 0, seed: 7, num_predict: 12 };
const messages = [{ role: "user", content: "tell me a story" }];
const chat = { model: "tiny", messages, options };
const tool = {
  type: "function",
  function: { name: "weather", description: "", parameters: { type: "object", properties: {} } },
};
const v1 = { model: "tiny", messages, temperature: 0, seed: 7, max_tokens: 12 };

const scenarios = {
  "ollama chat": () => ollama.chat(chat),
  "ollama chat streamed": () => all(ollama.chat({ ...chat, stream: true })),
  "ollama generate": () => ollama.generate({ model: "tiny", prompt: "once", options }),
  "ollama generate streamed": () =>
    all(ollama.generate({ model: "tiny", prompt: "once", options, stream: true })),
  "ollama embed": () => ollama.embed({ model: "tiny-embed", input: ["the sea", "a tree"] }),
  "ollama embeddings": () => ollama.embeddings({ model: "tiny-embed", prompt: "the sea" }),
  "ollama list": () => ollama.list(),
  "ollama show": () => ollama.show({ model: "tiny-tools" }),
  "ollama tools": () => ollama.chat({ ...chat, model: "tiny-tools", tools: [tool] }),
  "ollama tools streamed": () =>
    all(ollama.chat({ ...chat, model: "tiny-tools", tools: [tool], stream: true })),
  "ollama abort": abortOfOllama,
  "ollama missing": () => ollama.chat({ ...chat, model: "none" }),
  "ollama missing streamed": () => all(ollama.chat({ ...chat, model: "none", stream: true })),
  "ollama missing embed": () => ollama.embed({ model: "none", input: "x" }),
  "ollama tools refused": () => ollama.chat({ ...chat, tools: [tool] }),
  "openai chat": () => openai.chat.completions.create(v1),
  "openai chat streamed": () =>
    all(
      openai.chat.completions.create({
        ...v1,
        stream: true,
        stream_options: { include_usage: true },
      }),
    ),
  "openai models": async () => (await openai.models.list()).data,
  "openai embeddings": () => openai.embeddings.create({ model: "tiny-embed", input: "the sea" }),
  "openai abort": abortOfOpenAI,
  "openai missing": () => openai.chat.completions.create({ ...v1, model: "none" }),
  "openai missing streamed": () =>
    all(openai.chat.completions.create({ ...v1, model: "none", stream: true })),
  "openai missing model": () => openai.models.retrieve("none"),
};

async function all(stream) {
  const parts = [];
  for await (const part of await stream) parts.push(part);
  return parts;
}

// A stream that would run for long; the request after it shows that the model is free again.
async function abortOfOllama() {
  const long = { ...chat, options: { ...options, num_predict: 100000 }, stream: true };
  const stream = await ollama.chat(long);
  const error = await errorOf(async () => {
    for await (const part of stream) if (part.message.content) stream.abort();
  });
  return [error, await ollama.chat(chat)];
}

async function abortOfOpenAI() {
  const stream = await openai.chat.completions.create({ ...v1, max_tokens: 100000, stream: true });
  const error = await errorOf(async () => {
    for await (const part of stream) if (part.choices[0].delta.content) stream.controller.abort();
  });
  return [error, await openai.chat.completions.create(v1)];
}

async function errorOf(scenario) {
  try {
    return { value: await scenario() };
  } catch (error) {
    return {
      class: error.constructor.name,
      name: error.name,
      status: error.status_code ?? error.status ?? null,
      message: error.message,
    };
  }
}

const seen = {};
for (const [name, scenario] of Object.entries(scenarios)) seen[name] = await errorOf(scenario);
console.log(JSON.stringify(seen));
