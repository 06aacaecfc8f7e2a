// Clients of npm against a server: node clients.mjs SCENARIO URL. Prints one JSON document of what they made of its answers.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";
import OpenAI from "openai";

const [scenario, baseURL] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const provider = createOpenAICompatible({ name: "nanolab", baseURL });
const [user, assistant, system] = ["user", "assistant", "system"].map((role) => (content) => ({ role, content }));
const [hi, product] = [user("hi"), user("12*34?")];

const create = (messages, more) => client.chat.completions.create({ model: "parrot", messages, ...more });
const model = provider("parrot");
const generate = (messages, more) => generateText({ model, messages, maxRetries: 0, ...more });
const stream = (messages) => streamText({ model, messages, maxRetries: 0 });

const scenarios = {
  async openai() {
    const first = (await create([hi])).choices[0].message;
    const second = await create([hi, first, product]);
    let said = "";
    for await (const chunk of await create([hi], { stream: true })) said += chunk.choices[0].delta.content ?? "";
    const again = await client.chat.completions.stream({ model: "parrot", messages: [hi, assistant(said), product] }).finalContent();
    return [[first.content, second.choices[0].message.content, second.usage.prompt_tokens], [said, again]];
  },
  async "openai blanks"() {
    const blank = (await create([product], { max_tokens: 1 })).choices[0].message;
    await create([product, blank, hi]);
    const said = (await create([system(""), hi])).choices[0].message.content;
    await create([system("a"), system("b"), hi]);
    return [blank.content, said];
  },
  async ai() {
    const first = await generate([hi]);
    const second = await generate([hi, ...first.response.messages, product]);
    const said = stream([hi]);
    const again = stream([hi, ...(await said.response).messages, product]);
    return [[first.text, second.text, second.usage.inputTokens], [await said.text, await again.text]];
  },
  async "ai blanks"() {
    const blank = await generate([product], { maxOutputTokens: 1 });
    await generate([product, assistant(blank.text), hi]);
    const said = (await generate([hi], { system: "" })).text;
    await generate([system("a"), system("b"), hi]);
    return [blank.text, said];
  },
  async completions() {
    const ask = { model: "endless", prompt: "x", max_tokens: 5 };
    const plain = (await client.completions.create(ask)).choices[0].text;
    let said = "";
    for await (const chunk of await client.completions.create({ ...ask, stream: true })) said += chunk.choices[0].text;
    const text = { model: provider.completionModel("endless"), prompt: "x", maxOutputTokens: 5, maxRetries: 0 };
    return [plain, said, (await generateText(text)).text, await streamText(text).text];
  },
};
console.log(JSON.stringify(await scenarios[scenario]()));
