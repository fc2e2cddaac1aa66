"""What is read at the response positions equals the plain path: all logits, then log_softmax."""

import ast
import os
import subprocess
import sys
import warnings
import weakref
from contextlib import nullcontext
from pathlib import Path

import cases
import pytest
import torch
from small_models import ARCHITECTURES, OddLogits, recast, small_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2ForCausalLM

import bdpo_plugin.model.head as head_module
from bdpo_plugin.model.head import Head, statistics
from bdpo_plugin.model.reader import ResponseReader

CHUNK_ROWS = [1, 3, 7, 10_000]


@pytest.fixture
def batch(tokenizer):
    """Three right-padded rows, the positions before their responses, and the response tokens."""
    torch.manual_seed(1)
    lengths = [(4, 8), (7, 5), (1, 3)]  # prompt, response
    width = 12
    ids = torch.randint(5, len(tokenizer), (3, width))
    mask = torch.tensor([[i < p + r for i in range(width)] for p, r in lengths])
    positions = torch.tensor([[p - 1 <= i < p + r - 1 for i in range(width)] for p, r in lengths])
    labels = ids.roll(-1, dims=1)[positions]
    return {"input_ids": ids, "attention_mask": mask.long()}, positions, labels


def reader_of(tokenizer, rows):
    return ResponseReader(chunk_elements=rows * len(tokenizer))


def plain(model, inputs, positions, labels, **kwargs):
    """(logps, entropy, mean logit, correct) of all positions, the ordinary way."""
    logits = model(**inputs, use_cache=False, **kwargs).logits[:, -positions.shape[1] :]
    logits = logits[positions].float()
    logps = logits.log_softmax(-1)
    picked = logps.gather(-1, labels[:, None]).squeeze(-1)
    entropy = -(logps.exp() * logps).sum(-1)
    return picked, entropy, logits.mean(-1), (logits.argmax(-1) == labels).float()


def gradients(model, logps):
    model.zero_grad()
    slopes = torch.linspace(-1, 2, len(logps))
    loss = (logps * slopes).sum()
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss, found


def assert_equals_plain(model, reader, batch, *, rtol=1e-5, warns=False, **kwargs):
    inputs, positions, labels = batch
    theirs = plain(model, inputs, positions, labels, **kwargs)
    loss, wanted = gradients(model, theirs[0])
    expectation = (
        pytest.warns(UserWarning, match="does not reproduce the logits")
        if warns
        else warnings.catch_warnings()
    )
    with expectation:
        if not warns:
            warnings.filterwarnings("error", message="bdpo-plugin")
        mine, _ = reader.token_statistics(
            model, positions, labels, **inputs, use_cache=False, **kwargs
        )
    for ours, other in zip(mine, theirs, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, other, rtol=rtol, atol=rtol)
    my_loss, found = gradients(model, mine.logps)
    torch.testing.assert_close(my_loss, loss, rtol=rtol, atol=rtol)
    assert found.keys() == wanted.keys()
    assert wanted
    for name, gradient in wanted.items():
        atol = rtol * max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(found[name], gradient, rtol=rtol, atol=atol, msg=name)


def assert_no_hooks(model):
    assert not [n for n, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks]


@pytest.mark.parametrize("rows", CHUNK_ROWS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_trained_and_frozen(tokenizer, batch, architecture, rows):
    model = small_model(tokenizer, architecture)
    reader = reader_of(tokenizer, rows)
    assert_equals_plain(model, reader, batch)
    model.get_output_embeddings().requires_grad_(False)
    assert_equals_plain(model, reader, batch)
    assert_no_hooks(model)


def test_few_logits_are_held_and_many_computed_again(tokenizer, batch, monkeypatch):
    monkeypatch.setattr(head_module, "CPU_CHUNK_ELEMENTS", 3 * len(tokenizer))
    inputs, positions, labels = batch
    model = small_model(tokenizer)
    calls = []
    model.get_output_embeddings().register_forward_pre_hook(lambda *_: calls.append(1))
    number = {}
    for rows in (5, 10_000):
        reader = reader_of(tokenizer, rows)
        assert_equals_plain(model, reader, batch)
        calls.clear()
        found, _ = reader.token_statistics(model, positions, labels, **inputs)
        forward = len(calls)
        found.logps.sum().backward()
        number[rows] = len(calls) - forward
    assert number == {5: -(-len(labels) // 5), 10_000: 0}


def test_the_post_processing_is_not_idle(tokenizer, batch):
    """Else the test above would pass without any."""
    inputs, positions, labels = batch
    for architecture in ("soft-capped", "logit_scale", "logits_scaling"):
        model = small_model(tokenizer, architecture)
        states = model.base_model(**inputs).last_hidden_state[positions]
        bare = model.get_output_embeddings()(states).log_softmax(-1)
        bare = bare.gather(-1, labels[:, None]).squeeze(-1)
        assert (bare - plain(model, inputs, positions, labels)[0]).abs().max() > 0.1


def test_autocast(tokenizer, batch):
    model = small_model(tokenizer, "untied")
    with torch.autocast("cpu", torch.bfloat16):
        assert_equals_plain(model, reader_of(tokenizer, 3), batch, rtol=2e-2)


@pytest.mark.parametrize("architecture", ["tied", "soft-capped", "logit_scale"])
def test_bfloat16_is_as_good_as_the_plain_path(tokenizer, batch, architecture):
    """Against the float32 truth of the same weights, our error is no larger than the plain one's
    by more than a rounding of the logits."""
    inputs, positions, labels = batch
    half = small_model(tokenizer, architecture).bfloat16()
    truth = small_model(tokenizer, architecture)
    truth.load_state_dict({k: v.float() for k, v in half.state_dict().items()})
    wanted = plain(truth, inputs, positions, labels)[0]
    theirs = plain(half, inputs, positions, labels)[0]
    mine = reader_of(tokenizer, 3).token_statistics(half, positions, labels, **inputs)[0].logps
    worst = (theirs - wanted).abs().max()
    assert (mine - wanted).abs().max() <= 1.5 * worst + 1e-3
    gradients(half, mine)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("options", [None, {"use_reentrant": True}, {"use_reentrant": False}])
def test_gradient_checkpointing(tokenizer, batch, options, rows):
    model = small_model(tokenizer, "untied").train()
    if options:
        model.gradient_checkpointing_enable(options)
        model.enable_input_require_grads()
    assert_equals_plain(model, reader_of(tokenizer, rows), batch)


@pytest.mark.parametrize("rows", [1, 4, 10_000])
@pytest.mark.parametrize(
    "adapter",
    ["attention", "lm_head", "modules_to_save", "tied_head_saved", "dora", "prompt_tuning"],
)
def test_peft(tokenizer, batch, adapter, rows):
    peft = pytest.importorskip("peft")
    model = small_model(tokenizer, "tied" if "tied" in adapter else "untied")
    lora = {"r": 4, "init_lora_weights": False}
    config = {
        "attention": lambda: peft.LoraConfig(**lora, target_modules=["q_proj"]),
        "dora": lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], use_dora=True),
        "lm_head": lambda: peft.LoraConfig(**lora, target_modules=["q_proj", "lm_head"]),
        "modules_to_save": lambda: peft.LoraConfig(
            **lora, target_modules=["q_proj"], modules_to_save=["lm_head"]
        ),
        "tied_head_saved": lambda: peft.LoraConfig(
            **lora, target_modules=["q_proj"], modules_to_save=["lm_head"]
        ),
        "prompt_tuning": lambda: peft.PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=3
        ),
    }[adapter]()
    model = peft.get_peft_model(model, config)
    if adapter == "prompt_tuning":
        model.word_embeddings.weight.data.normal_()
    reader = reader_of(tokenizer, rows)
    assert_equals_plain(model, reader, batch)
    with model.disable_adapter(), torch.no_grad():
        inputs, positions, labels = batch
        mine = reader.token_statistics(model, positions, labels, **inputs)[0]
        theirs = plain(model, inputs, positions, labels)
        for ours, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def saved_model(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    small_model(tokenizer, "untied", hidden_size=64).save_pretrained(path)
    return path


@pytest.mark.parametrize("head", ["frozen", "lora", "4bit"])
def test_quantised_to_4_bits(saved_model, tokenizer, batch, head):
    pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["no_such_module"] if head == "4bit" else None,
    )
    model = AutoModelForCausalLM.from_pretrained(
        saved_model, quantization_config=config, dtype=torch.float32
    )
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    assert (model.lm_head.weight.dtype == torch.uint8) == (head == "4bit")
    targets = ["q_proj", "lm_head"] if head == "lora" else ["q_proj"]
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=4, init_lora_weights=False, target_modules=targets)
    )
    # in evaluation mode bitsandbytes packs its weights, on some CPUs
    assert_equals_plain(model.train(), reader_of(tokenizer, 3), batch)
    model.eval()
    with torch.no_grad():
        reader_of(tokenizer, 3).token_statistics(model, *batch[1:], **batch[0])
    assert_equals_plain(model.train(), reader_of(tokenizer, 3), batch)


def test_auxiliary_loss_of_a_mixture_of_experts(tokenizer, batch):
    model = small_model(tokenizer, "moe")
    inputs, positions, labels = batch
    reader = reader_of(tokenizer, 2)
    assert_equals_plain(model, reader, batch, output_router_logits=True)
    theirs = model(**inputs, output_router_logits=True)
    _, outputs = reader.token_statistics(
        model, positions, labels, **inputs, output_router_logits=True
    )
    assert outputs.aux_loss > 0
    torch.testing.assert_close(outputs.aux_loss, theirs.aux_loss)
    (mine,) = torch.autograd.grad(outputs.aux_loss, model.model.embed_tokens.weight)
    (wanted,) = torch.autograd.grad(theirs.aux_loss, model.model.embed_tokens.weight)
    torch.testing.assert_close(mine, wanted)


class HiddenHead(Qwen2ForCausalLM):
    def get_output_embeddings(self):
        return None


def test_unknown_postprocessing_falls_back_with_one_warning(tokenizer, batch):
    model = recast(small_model(tokenizer), OddLogits)
    reader = reader_of(tokenizer, 2)
    assert_equals_plain(model, reader, batch, warns=True)
    assert_equals_plain(model, reader, batch)
    assert_no_hooks(model)


def test_the_fallback_projects_the_response_positions_only(tokenizer, batch):
    model = recast(small_model(tokenizer), OddLogits)
    inputs, positions, labels = batch
    reader = ResponseReader()
    with pytest.warns(UserWarning, match="OddLogits"):
        _, outputs = reader.token_statistics(model, positions, labels, **inputs)
    assert outputs.logits.shape == (1, int(positions.sum()), len(tokenizer))


def test_a_model_without_a_findable_head(tokenizer, batch):
    model = recast(small_model(tokenizer), HiddenHead)
    assert_equals_plain(model, reader_of(tokenizer, 2), batch)


def test_a_small_wrong_offset_is_noticed(tokenizer, batch):
    """One part in a thousand of the logits: far from rounding, near enough to be overlooked."""

    class Slightly(Qwen2ForCausalLM):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs.logits = outputs.logits * 1.001
            return outputs

    model = recast(small_model(tokenizer), Slightly)
    assert_equals_plain(model, reader_of(tokenizer, 2), batch, warns=True)


@pytest.mark.parametrize("lora", [False, True])
def test_dropout_in_training_mode_is_no_disagreement(tokenizer, batch, lora):
    """Nor does the comparison draw from the random numbers of training, or leave another mode."""
    model = small_model(tokenizer, "untied", attention_dropout=0.5)
    if lora:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=4,
                lora_dropout=0.5,
                init_lora_weights=False,
                target_modules=["q_proj", "lm_head"],
            ),
        )
    model.train()
    frozen = model.get_submodule("base_model.model.model.norm" if lora else "model.norm").eval()
    inputs, positions, labels = batch
    reader = reader_of(tokenizer, 4)
    runs = []
    for _ in range(2):  # the first one compares
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="bdpo-plugin")
            runs.append(reader.token_statistics(model, positions, labels, **inputs)[0].logps)
    torch.testing.assert_close(*runs, rtol=0, atol=0)
    assert model.training
    assert not frozen.training
    torch.manual_seed(1)
    other = reader.token_statistics(model, positions, labels, **inputs)[0].logps
    assert not torch.allclose(other, runs[0]), "there was no dropout to speak of"


@pytest.mark.parametrize("reader_knows_the_model", [False, True])
def test_hooks_do_not_survive_an_exception(tokenizer, batch, reader_knows_the_model):
    model = small_model(tokenizer)
    inputs, positions, labels = batch
    reader = reader_of(tokenizer, 2)
    if reader_knows_the_model:
        reader.token_statistics(model, positions, labels, **inputs)

    def fail(*_):
        raise RuntimeError("broken layer")

    handle = model.model.norm.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="broken layer"):
        reader.token_statistics(model, positions, labels, **inputs)
    handle.remove()
    assert_no_hooks(model)
    assert_equals_plain(model, reader, batch)


def test_an_exception_of_the_function_leaves_no_hook(tokenizer, batch):
    model = small_model(tokenizer)
    inputs, positions, _ = batch
    with pytest.raises(ZeroDivisionError):
        ResponseReader().read(model, positions, lambda *_: 1 / 0, **inputs)
    assert_no_hooks(model)


@pytest.mark.slow
@pytest.mark.parametrize("plain_call_first", cases.first(1, [True, False]))
def test_compiled_model(tokenizer, batch, plain_call_first):
    """A graph that was compiled without our hooks does not call them."""
    torch._dynamo.reset()
    inputs, positions, labels = batch
    model = small_model(tokenizer, "untied")
    compiled = torch.compile(model, backend="eager")
    wanted = plain(model, inputs, positions, labels)
    if plain_call_first:
        compiled(**inputs, use_cache=False)
    reader = reader_of(tokenizer, 4)
    for _ in range(2):
        mine, _ = reader.token_statistics(compiled, positions, labels, **inputs, use_cache=False)
        torch.testing.assert_close(mine.logps, wanted[0])
        torch.testing.assert_close(mine.entropy, wanted[1])


def test_one_reader_serves_two_models(tokenizer, batch):
    """The policy falls back, the reference does not, turn and turn about."""
    odd, plain_model = recast(small_model(tokenizer), OddLogits), small_model(tokenizer, "untied")
    reader = reader_of(tokenizer, 2)
    assert_equals_plain(odd, reader, batch, warns=True)
    for model in (plain_model, odd, plain_model):
        assert_equals_plain(model, reader, batch)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned, and in how many
    places such tensors were."""

    def __init__(self):
        super().__init__()
        self.numel, self.places = 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.numel() >= self.numel:
                self.places = self.places if tensor.numel() == self.numel else set()
                self.numel = tensor.numel()
                self.places.add(tensor.data_ptr())
        return result


@pytest.mark.parametrize("head", ["trained", "frozen", "no gradient"])
def test_no_tensor_is_larger_than_the_chunk(tokenizer, head):
    rows, vocabulary = 64, len(tokenizer)  # more rows than the 32 of the weights
    model = small_model(tokenizer, "untied")
    ids = torch.randint(5, vocabulary, (4, 80))
    positions = torch.zeros_like(ids, dtype=torch.bool)
    positions[:, 3:-1] = True
    labels = ids.roll(-1, dims=1)[positions]
    model.lm_head.requires_grad_(head == "trained")
    reader = reader_of(tokenizer, rows)

    def largest(function):
        with Largest() as seen, torch.no_grad() if head == "no gradient" else nullcontext():
            logps = function()
            if logps.requires_grad:
                logps.sum().backward()
        return seen.numel

    mine = largest(
        lambda: reader.token_statistics(model, positions, labels, input_ids=ids)[0].logps
    )
    theirs = largest(lambda: plain(model, {"input_ids": ids}, positions, labels)[0])
    assert theirs >= len(labels) * vocabulary
    assert mine <= rows * vocabulary


@pytest.mark.parametrize("trained", [False, True])
def test_the_logits_are_made_once_and_overwritten(trained, monkeypatch):
    """By their gradient: 64 rows of 500, read four at a time, and nothing else of that size."""
    monkeypatch.setattr(head_module, "CPU_BLOCK_ELEMENTS", 2000)
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 500, bias=False).requires_grad_(trained)
    states, labels = torch.randn(64, 8, requires_grad=True), torch.randint(500, (64,))
    head = Head(lambda rows: layer(rows).float(), rows=64, held=64, trained=trained)
    with Largest() as seen:
        found = statistics(states, head, labels)
        found.logps.sum().backward(retain_graph=True)
    assert (seen.numel, len(seen.places)) == (64 * 500, 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.logps.sum().backward()


def test_backward_keeps_no_logits(tokenizer):
    """Between forward and backward no chunk's logits are held for the backward."""
    vocabulary = len(tokenizer)
    ids = torch.randint(5, vocabulary, (2, 40))
    positions = torch.ones_like(ids, dtype=torch.bool)
    for trained in (True, False):
        model = small_model(tokenizer, "untied")
        model.lm_head.requires_grad_(trained)
        kept = weakref.WeakSet()

        class Saved:
            def __init__(self, tensor, kept=kept):
                self.tensor = tensor
                kept.add(self)

        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            result = reader_of(tokenizer, 8).token_statistics(
                model, positions, ids.roll(-1, dims=1)[positions], input_ids=ids
            )
        shapes = {tuple(saved.tensor.shape) for saved in kept}
        assert (2, 40, 32) in shapes
        assert not [shape for shape in shapes if shape[-1:] == (vocabulary,) and shape[0] == 8]
        del result


# --- what hosts put in the place of torch's functions -------------------------------------------


def overwriting(logits, labels, reduction="none", **_):
    """As Liger's kernel, which leaves the gradient in the place of its input."""
    logps = logits.log_softmax(-1)
    with torch.no_grad():
        logits.copy_(logps.exp() - torch.nn.functional.one_hot(labels, logits.shape[-1]))
    losses = -logps.gather(-1, labels[:, None]).squeeze(-1)
    return losses if reduction == "none" else losses.mean()


@pytest.mark.parametrize("head", ["trained", "frozen", "no gradient"])
@pytest.mark.parametrize("rows", [4, 10_000])
def test_another_cross_entropy_in_the_place_of_torchs(tokenizer, batch, monkeypatch, head, rows):
    model, (inputs, positions, labels) = small_model(tokenizer, "untied"), batch
    model.lm_head.requires_grad_(head == "trained")

    def read():
        with torch.no_grad() if head == "no gradient" else nullcontext():
            reader = reader_of(tokenizer, rows)
            found, _ = reader.token_statistics(model, positions, labels, **inputs)
        slopes = {} if head == "no gradient" else gradients(model, found.logps)[1]
        return [*(tensor.detach() for tensor in found), *slopes.values()]

    wanted = read()
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", overwriting)
    for mine, theirs in zip(read(), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@pytest.mark.slow
def test_liger_in_the_place_of_torchs_cross_entropy(tmp_path):
    """The real kernel, through Triton's interpreter, which is chosen before it is imported."""
    pytest.importorskip("liger_kernel")
    script = tmp_path / "with_liger.py"
    script.write_text(_WITH_LIGER, encoding="utf-8")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, script], check=True, env=environment)


_WITH_LIGER = """
import torch
from bdpo_plugin.model.head import Head, statistics

hidden, labels = torch.randn(5, 16, requires_grad=True), torch.arange(5)
weight = torch.randn(16, 64)
head = Head(lambda rows: rows @ weight, 99, 99, trained=False)


def read():
    found = statistics(hidden, head, labels)
    return [*found, *torch.autograd.grad(found.logps.sum(), hidden)]


wanted = read()
from liger_kernel.transformers import apply_liger_kernel_to_llama
before = torch.nn.functional.cross_entropy
apply_liger_kernel_to_llama(cross_entropy=True, fused_linear_cross_entropy=False)
assert torch.nn.functional.cross_entropy is not before
for mine, theirs in zip(read(), wanted, strict=True):
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
"""


#: What the plugins of Axolotl, LLaMA-Factory and Liger replace, for the whole process, of what
#: computes a loss.
_REPLACED = {
    "cross_entropy",
    "CrossEntropyLoss",
    "fixed_cross_entropy",
    "ForCausalLMLoss",
    "selective_log_softmax",
    "entropy_from_logits",
}


def test_nothing_of_ours_calls_what_hosts_replace():
    package = Path(head_module.__file__).parents[1]
    used = {
        (path.name, name)
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in [
            *([node.attr] if isinstance(node, ast.Attribute) else []),
            *([node.id] if isinstance(node, ast.Name) else []),
            *([alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []),
        ]
    }
    assert {(file, name) for file, name in used if name in _REPLACED} == set()
    assert ("head.py", "exp_") in used
