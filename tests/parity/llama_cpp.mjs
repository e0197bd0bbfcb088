// What llama.cpp makes of GGUF files: node llama_cpp.mjs FOLDER-WITH-node_modules JOBS.json ANSWERS.json
// A job: {model, texts, ids: rows of tokens, full: all logits or only the top token, cache: type of the KV cache}.
// Its answer: {tokens: of each text, bos, top: of each position of each row, logits: likewise, if full}.
import {readFileSync, writeFileSync} from "node:fs";
import {join, resolve} from "node:path";
import {pathToFileURL} from "node:url";

const [folder, jobs, answers] = process.argv.slice(2);
const entry = join(resolve(folder), "node_modules", "node-llama-cpp", "dist", "index.js");
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(entry).href);
const llama = await getLlama({gpu: false, build: "never", maxThreads: 2, logLevel: LlamaLogLevel.error});

async function rows(model, job) {
    const context = await model.createContext({
        contextSize: Math.max(64, ...job.ids.map((row) => row.length + 8)),
        experimentalKvCacheKeyType: job.cache,
        experimentalKvCacheValueType: job.cache,
        flashAttention: false
    });
    const sequence = context.getSequence();
    const wanted = {generateNext: {logits: job.full ? true : {filter: {includeTop: 1}}}};
    const found = [];
    for (const row of job.ids) {
        await sequence.clearHistory();
        const outputs = await sequence.controlledEvaluate(row.map((token) => [token, wanted]));
        found.push(outputs.map((output) => output.next.logits));
    }
    await context.dispose();
    return found;
}

function byToken(logits) {
    return [...logits].sort((one, two) => one[0] - two[0]).map((pair) => pair[1]);
}

function answer(model, job, found) {
    return {
        tokens: job.texts.map((text) => model.tokenize(text, true)),
        bos: model.tokens.shouldPrependBosToken,
        top: found.map((row) => row.map((logits) => logits.keys().next().value)),
        logits: job.full ? found.map((row) => row.map(byToken)) : null
    };
}

const done = [];
for (const job of JSON.parse(readFileSync(jobs, "utf8"))) {
    const model = await llama.loadModel({modelPath: job.model, gpuLayers: 0});
    done.push(answer(model, job, job.ids.length ? await rows(model, job) : []));
    await model.dispose();
}
writeFileSync(answers, JSON.stringify(done));
process.exit(0);
