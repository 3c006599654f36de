// TypeScript over gRPC, from the protocol's own file:
//   npm install @grpc/grpc-js @grpc/proto-loader typescript
import * as grpc from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";

const [address = "127.0.0.1:8001", proto = "protos/inference/inference.proto"] = process.argv.slice(2);

interface Output {
  name: string;
  datatype: string;
  shape: number[];
}

interface Answer {
  model_version: string;
  outputs: Output[];
  raw_output_contents: Buffer[];
}

const loaded = grpc.loadPackageDefinition(loadSync(proto, { keepCase: true, longs: Number }));
const { GRPCInferenceService } = loaded.inference as unknown as Record<string, grpc.ServiceClientConstructor>;
const client = new GRPCInferenceService!(address, grpc.credentials.createInsecure());

const request = {
  model_name: "penguins",
  inputs: [
    { name: "island", datatype: "BYTES", shape: [1, 1], contents: { bytes_contents: [Buffer.from("Dream")] } },
    { name: "bill_length_mm", datatype: "FP64", shape: [1, 1], contents: { fp64_contents: [50.0] } },
    { name: "sex", datatype: "BYTES", shape: [1, 1], contents: { bytes_contents: [Buffer.from("")] } },
  ],
};
const deadline = Date.now() + 10_000;
const answer = await new Promise<Answer>((resolve, reject) => {
  client.ModelInfer!(request, new grpc.Metadata(), { deadline }, (error: grpc.ServiceError | null, answer: Answer) =>
    error ? reject(error) : resolve(answer),
  );
});

// A BYTES element is its length, four bytes, little-endian, and its bytes.
const place = answer.outputs.findIndex((output) => output.name === "label");
const raw = answer.raw_output_contents[place]!;
console.log(raw.subarray(4, 4 + raw.readUInt32LE(0)).toString());
client.close();
