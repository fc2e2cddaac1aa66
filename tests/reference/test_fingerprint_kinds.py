"""The fingerprint of weights that are no plain tensors: each is read in full, or refused."""

import pytest
import torch
from small_models import small_model
from test_fingerprint import lora, of
from torch import nn
from transformers import AutoModelForCausalLM

from bdpo_plugin.reference.fingerprint import UnreadableReference, model_fingerprint


class Scaled(torch.Tensor):
    """A weight of two parts, by the protocol of wrapper subclasses."""

    @staticmethod
    def __new__(cls, codes, scale, context=None):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes, scale, context=None):
        self.codes, self.scale, self.context = codes, scale, context

    def __tensor_flatten__(self):
        return ["codes", "scale"], {"context": self.context}

    @classmethod
    def __tensor_unflatten__(cls, parts, context, size, stride):
        return cls(parts["codes"], parts["scale"], context["context"])

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments, keywords=None):
        if function is torch.ops.aten.detach.default:
            return cls(arguments[0].codes, arguments[0].scale, arguments[0].context)
        raise NotImplementedError(f"{function} of a {cls.__name__}")


class Opaque(Scaled):
    """One that does not say what it is made of."""

    __tensor_flatten__ = None


class Noted(nn.Parameter):
    """Plain bytes, and beside them what they mean."""


def noted(tensor, **notes):
    parameter = tensor.as_subclass(Noted)
    vars(parameter).update(notes)
    return parameter


ONES, HALVES = torch.ones(4, 4), torch.full((4,), 0.5)


def test_parts_and_context_count():
    variants = [
        Scaled(ONES, HALVES),
        Scaled(2 * ONES, HALVES),
        Scaled(ONES, 2 * HALVES),
        Scaled(ONES, HALVES, (1, "symmetric")),
        Scaled(ONES, HALVES, (2, "symmetric")),
        Scaled(ONES, HALVES, {"by": [torch.relu, ONES.dtype]}),
        Scaled(ONES, HALVES, {"by": [of, ONES.dtype]}),
        Scaled(Scaled(ONES, HALVES), HALVES),
        Scaled(Scaled(ONES, 2 * HALVES), HALVES),
        Scaled(ONES.half(), HALVES),
        ONES,
    ]
    assert len({of(tensor) for tensor in variants}) == len(variants)
    assert of(Scaled(ONES.clone(), HALVES.clone(), (1, "a"))) == of(Scaled(ONES, HALVES, (1, "a")))


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (Opaque(ONES, HALVES), "a Opaque of torch.float32"),
        (Scaled(Opaque(ONES, HALVES), HALVES), "a Scaled of torch.float32"),
        (
            Scaled(ONES, HALVES, object()),
            "it depends on <object object at .*which shows no content",
        ),
        (Scaled(ONES, None), "a Scaled of"),
        (noted(ONES, bits=4), "a Noted of torch.float32.*what its class makes of its bytes"),
        (ONES.to_sparse(), "a Tensor of torch.float32.*only dense tensors of real numbers"),
        (ONES.to(torch.complex64), "a Tensor of torch.complex64.*only dense tensors"),
        (torch.empty(3, device="meta"), "on meta, cannot be read: its values are not here"),
        (Scaled(torch.empty(3, device="meta"), HALVES), "its values are not here"),
        (torch.quantize_per_tensor(ONES, 0.1, 0, torch.qint8), "a Tensor of torch.qint8"),
        (nn.parameter.UninitializedBuffer(), "a UninitializedBuffer"),
    ],
    ids=lambda value: "" if isinstance(value, torch.Tensor) else value[:30],
)
def test_what_cannot_be_read_is_refused(tensor, words):
    """By name: a fingerprint that ignored it would take one model's scores for another's."""
    with pytest.raises(UnreadableReference, match=f"the reference's weight 'b0'.*{words}"):
        of(tensor)


def test_views():
    dense = torch.eye(6) * torch.arange(1.0, 7)
    assert of(dense[::2, 1::2]) == of(dense[::2, 1::2].clone())
    variants = [dense, dense[::2], dense.T.half(), torch.empty(0, 3), torch.empty(3, 0)]
    assert len({of(tensor) for tensor in variants}) == len(variants)


# --- weights that accelerate has offloaded ---------------------------------------------------


@pytest.mark.parametrize("where", ["cpu", "disk", "blocks"])
def test_offloaded_weights(tokenizer, tmp_path, where):
    """Their values are read where they lie, and the model is left as it was."""
    from accelerate import cpu_offload, disk_offload
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = small_model(tokenizer, "untied")
    before, ids = model_fingerprint(model), torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    if where == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    elif where == "disk":
        disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    else:  # one hook for all that is within
        for block in model.model.layers:
            values = {name: value.clone() for name, value in block.state_dict().items()}
            hook = AlignDevicesHook("cpu", offload=True, weights_map=values, place_submodules=True)
            add_hook_to_module(block, hook)
    meta = sum(parameter.is_meta for parameter in model.parameters())
    assert meta > 4
    assert model_fingerprint(model) == before
    assert sum(parameter.is_meta for parameter in model.parameters()) == meta
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, logits)


def test_weights_that_are_nowhere(tokenizer):
    with pytest.raises(UnreadableReference, match=r"Parameter on meta.*values are not here"):
        model_fingerprint(small_model(tokenizer).to("meta"))


# --- torchao ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bases(tokenizer, tmp_path_factory):
    """Two models on disk."""
    folders = [tmp_path_factory.mktemp("base") for _ in range(2)]
    for seed, folder in enumerate(folders):
        small_model(tokenizer, hidden_size=64, seed=seed).save_pretrained(folder)
    return folders


@pytest.mark.parametrize(
    "name",
    ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"],
)
def test_models_that_torchao_quantised(bases, name):
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    def load(folder, **options):
        config = TorchAoConfig(getattr(quantization, name)(**options))
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, dtype=torch.bfloat16
        )

    model = load(bases[0])
    before = model_fingerprint(model)
    assert model_fingerprint(load(bases[0])) == before
    assert model_fingerprint(load(bases[1])) != before
    wrapped = lora(model)
    wrapped.train()
    wrapped(input_ids=torch.tensor([[5, 6, 7]]))
    assert model_fingerprint(wrapped) == before
    weight = wrapped.get_base_model().model.layers[0].mlp.down_proj.weight
    leaves = list(plain_parts(weight))
    assert len(leaves) > 1
    for number, leaf in enumerate(leaves):
        with torch.no_grad():
            kept = leaf.clone()
            leaf.view(torch.uint8).view(-1)[-1] ^= 1
            assert model_fingerprint(wrapped) != before, number
            leaf.copy_(kept)
    assert model_fingerprint(wrapped) == before


def plain_parts(tensor):
    """What a quantised weight is made of in the end."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from plain_parts(getattr(tensor, name))


def test_what_a_layer_keeps_in_a_dict_counts(tokenizer):
    """As HQQ keeps the scales and zero points of its codes."""
    found = set()
    for scale in (1.0, 2.0, 1.0):
        model = small_model(tokenizer)
        nested = {"meta_scale": {"zero": torch.ones(2)}, "scale": torch.full((2,), scale)}
        model.model.layers[0].mlp.up_proj.meta = nested | {"shape": (2, 2)}
        found.add(model_fingerprint(model))
    found.add(model_fingerprint(small_model(tokenizer)))
    assert len(found) == 3
