"""Checks manifests against the models of KServe's and Kubernetes' Python clients: fields are known, of their types, none missing.

The models are generated from the schema that the custom resource definitions are made of. Arguments: files.
"""

import re
import sys
from pathlib import Path

import kserve
import kubernetes.client
import yaml
from kserve.constants import constants

API = {
    f"{constants.KSERVE_GROUP}/v1beta1": "V1beta1",
    f"{constants.KSERVE_GROUP}/v1alpha1": "V1alpha1",
    "apps/v1": "V1",
    "v1": "V1",
}
SCALARS = {"str": str, "int": int, "bool": bool, "float": (int, float)}


def model_named(name: str) -> type:
    return getattr(kserve.models, name, None) or getattr(kserve, name, None) or getattr(kubernetes.client, name)


def check(value: object, kind: str, where: str) -> object:
    """The value as an instance of its model, or of its plain type."""
    if listed := re.fullmatch(r"[lL]ist\[(.+)\]", kind):
        assert isinstance(value, list), f"{where}: expected a list, got {value!r}"
        return [check(each, listed[1], f"{where}[{index}]") for index, each in enumerate(value)]
    if mapped := re.fullmatch(r"[dD]ict[(\[]str, (.+)[)\]]", kind):
        assert isinstance(value, dict), f"{where}: expected a mapping, got {value!r}"
        return {key: check(each, mapped[1], f"{where}.{key}") for key, each in value.items()}
    if kind == "object" or kind == "ResourceQuantity":
        return value
    if kind in SCALARS:
        is_right = isinstance(value, SCALARS[kind]) and isinstance(value, bool) == (kind == "bool")
        assert is_right, f"{where}: {value!r} is no {kind}"
        return value
    model = model_named(kind)
    names = {key: attribute for attribute, key in model.attribute_map.items()}
    assert isinstance(value, dict), f"{where}: expected a {kind}, got {value!r}"
    assert value.keys() <= names.keys(), f"{where}: {kind} has no {', '.join(value.keys() - names.keys())}"
    fields = {names[key]: check(each, model.openapi_types[names[key]], f"{where}.{key}") for key, each in value.items()}
    try:
        return model(**fields)
    except ValueError as error:
        raise AssertionError(f"{where}: {error}") from error


if __name__ == "__main__":
    for path in sys.argv[1:]:
        for manifest in yaml.safe_load_all(Path(path).read_text()):
            check(manifest, API[manifest["apiVersion"]] + manifest["kind"], f"{Path(path).name}: {manifest['kind']}")
    print("passed")
