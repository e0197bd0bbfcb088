// What transformers.js makes of bundles: node transformers_js.mjs FOLDER-WITH-node_modules JOBS.json ANSWERS.json
// A job: {root: folder of bundles, name, dtype, texts}. Its answer: of each text {label: probability}.
import {readFileSync, writeFileSync} from "node:fs";
import {join, resolve} from "node:path";
import {pathToFileURL} from "node:url";

const [folder, jobs, answers] = process.argv.slice(2);
const entry = join(resolve(folder), "node_modules/@huggingface/transformers/dist/transformers.node.mjs");
const {env, pipeline} = await import(pathToFileURL(entry).href);
env.allowRemoteModels = false;
env.allowLocalModels = true;

const done = [];
for (const job of JSON.parse(readFileSync(jobs, "utf8"))) {
    env.localModelPath = job.root;
    const classify = await pipeline("text-classification", job.name, {dtype: job.dtype});
    const found = [];
    for (const text of job.texts) {
        const chances = await classify(text, {top_k: null});
        found.push(Object.fromEntries(chances.map((one) => [one.label, one.score])));
    }
    done.push(found);
    await classify.dispose();
}
writeFileSync(answers, JSON.stringify(done));
