// TypeScript over REST, with types made from the server's own document:
//   npm install openapi-fetch openapi-typescript typescript
//   npx openapi-typescript http://127.0.0.1:8000/openapi.json -o api.ts
import createClient from "openapi-fetch";
import type { paths } from "./api.js";

const url = process.argv[2] ?? "http://127.0.0.1:8000";
const client = createClient<paths, "application/json">({ baseUrl: url }); // tensors can be binary, too

const answer = await client.POST("/v2/models/{model}/infer", {
  params: { path: { model: "penguins" } },
  body: {
    inputs: [
      { name: "island", datatype: "BYTES", shape: [1, 1], data: ["Dream"] },
      { name: "bill_length_mm", datatype: "FP64", shape: [1, 1], data: [50.0] },
      { name: "sex", datatype: "BYTES", shape: [1, 1], data: [""] },
    ],
  },
});
if (answer.error !== undefined) {
  throw new Error(answer.error.error);
}
const label = answer.data.outputs.find((output) => output.name === "label");
console.log(label?.data?.[0]);

const rows = await client.POST("/v1/models/{model}:predict", {
  params: { path: { model: "penguins" } },
  body: { instances: [{ island: "Dream", bill_length_mm: 50.0, sex: null }] },
});
if (rows.data === undefined || !("predictions" in rows.data)) {
  throw new Error("no predictions");
}
console.log(JSON.stringify(rows.data.predictions[0]));
