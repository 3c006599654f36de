"""The clients that are generated from the protocol's own documents, over REST and gRPC. Arguments: address of each face."""

import struct
import sys

import grpc
from open_inference.grpc import protocol as pb
from open_inference.grpc.service import GRPCInferenceServiceStub
from open_inference.openapi.client import OpenInferenceClient
from open_inference.openapi.errors import NotFoundError
from open_inference.openapi.types import InferenceRequest, RequestInput, RequestOutput, TensorData

rest = OpenInferenceClient(base_url=f"http://{sys.argv[1]}")
rest.check_server_liveness()
rest.check_server_readiness()
rest.check_model_readiness("simple")
rest.check_model_version_readiness("simple", "1.1")
try:
    rest.check_model_readiness("nope")
except NotFoundError:
    pass
else:
    raise AssertionError("an unknown model is ready")
assert rest.read_server_metadata().name == "splitserve"
assert [tensor.shape for tensor in rest.read_model_metadata("simple").inputs] == [[-1, 16]] * 2
assert rest.read_model_version_metadata("simple", "1.1").name == "simple"


def tensor(name: str, datatype: str, values: list) -> RequestInput:
    return RequestInput(name=name, shape=[1, len(values)], datatype=datatype, data=TensorData(__root__=values))


asked = InferenceRequest(id="7", inputs=[tensor("INPUT0", "FP32", [1.5, 2.0])], outputs=[RequestOutput(name="OUTPUT0")])
for answer in (rest.model_infer("identity_fp32", request=asked), rest.model_version_infer("identity_fp32", "1.1", request=asked)):
    assert (answer.id, answer.model_version, answer.outputs[0].data.__root__) == ("7", "1.1", [1.5, 2.0])
# This client sends every number as a float: 1.0 for 1.
integers = InferenceRequest(inputs=[tensor(name, "INT32", list(range(16))) for name in ("INPUT0", "INPUT1")])
assert rest.model_infer("simple", request=integers).outputs[0].data.__root__ == [2.0 * number for number in range(16)]
text = InferenceRequest(inputs=[tensor("INPUT0", "BYTES", ["a", "ü"])])
assert rest.model_infer("simple_identity", request=text).outputs[0].data.__root__ == ["a", "ü"]

stub = GRPCInferenceServiceStub(grpc.insecure_channel(sys.argv[2]))
assert stub.ServerLive(pb.ServerLiveRequest()).live
assert stub.ServerReady(pb.ServerReadyRequest()).ready
assert stub.ModelReady(pb.ModelReadyRequest(name="simple", version="1.1")).ready
assert not stub.ModelReady(pb.ModelReadyRequest(name="nope")).ready
assert stub.ServerMetadata(pb.ServerMetadataRequest()).name == "splitserve"
assert list(stub.ModelMetadata(pb.ModelMetadataRequest(name="simple")).versions) == ["1.1"]
spec = pb.ModelInferRequest.InferInputTensor(name="INPUT0", datatype="FP32", shape=[1, 2])
raw = struct.pack("<2f", 1.5, 2.0)
typed = pb.ModelInferRequest.InferInputTensor(
    name="INPUT0", datatype="FP32", shape=[1, 2], contents=pb.InferTensorContents(fp32_contents=[1.5, 2.0])
)
for request in (
    pb.ModelInferRequest(model_name="identity_fp32", inputs=[spec], raw_input_contents=[raw]),
    pb.ModelInferRequest(model_name="identity_fp32", model_version="1.1", inputs=[typed]),
):
    answer = stub.ModelInfer(request)
    assert (answer.model_version, list(answer.raw_output_contents)) == ("1.1", [raw])
print("passed")
