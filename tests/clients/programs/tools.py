"""A client that knows nothing but reflection, and health probes. Arguments: address of the gRPC face."""

import sys

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

channel = grpc.insecure_channel(sys.argv[1])
database = ProtoReflectionDescriptorDatabase(channel)
assert "inference.GRPCInferenceService" in database.get_services()
pool = DescriptorPool(database)
service = pool.FindServiceByName("inference.GRPCInferenceService")


def call(name: str, /, **fields: object) -> object:
    method = service.FindMethodByName(name)
    send = channel.unary_unary(
        f"/{service.full_name}/{name}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=GetMessageClass(method.output_type).FromString,
    )
    return send(GetMessageClass(method.input_type)(**fields))


assert call("ModelReady", name="simple").ready
contents = {"int_contents": [1] * 16}
tensors = [{"name": name, "datatype": "INT32", "shape": [1, 16], "contents": contents} for name in ("INPUT0", "INPUT1")]
answer = call("ModelInfer", model_name="simple", inputs=tensors)
assert answer.raw_output_contents[0] == (2).to_bytes(4, "little") * 16

stub = health_pb2_grpc.HealthStub(channel)
for name in ("", "inference.GRPCInferenceService"):
    request = health_pb2.HealthCheckRequest(service=name)
    assert stub.Check(request).status == health_pb2.HealthCheckResponse.SERVING
    assert next(iter(stub.Watch(request))).status == health_pb2.HealthCheckResponse.SERVING
print("passed")
