"""How the batches of a run are laid, why, and what a user is told of it."""

import json
import math

from running import build_tokenizer, history, sharp_model, trainer
from transformers import DeepseekV32Config

LN2 = math.log(2)
#: Of latent attention, with an indexer that keeps 8 tokens.
SPARSE = {
    "num_key_value_heads": 4,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "index_n_heads": 4,
    "index_head_dim": 16,
    "index_topk": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
}


def run(tmp_path, **options):
    made = trainer(output_dir=tmp_path, bdpo_cache_dir=None, max_steps=1, **options)
    made.train()
    layout = json.loads((tmp_path / "bdpo" / "run.json").read_text())["layout"]
    return history(made, "loss")[0], layout


def sparse_model():
    return sharp_model(config=DeepseekV32Config, hidden_size=64, layers=2, **SPARSE)


def test_a_model_that_depends_on_padding_is_told_of(tmp_path, capsys):
    loss, layout = run(tmp_path, model=sparse_model())
    assert abs(loss - LN2) > 1e-3
    assert layout["scoring"]["kind"] == layout["training"]["kind"] == "padded"
    assert layout["scoring"]["padding"]["right"]["times_rounding"] > 100
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "depends on the padding of its batch" in shown
    assert "set `bdpo_precompute: false`" in shown


def test_the_remedy_that_is_told_of_holds(tmp_path):
    """Also where a step's pairs are scored in several batches, of other widths than its own."""
    options = {"bdpo_precompute": False, "bdpo_score_tokens": 60}
    loss, layout = run(tmp_path, model=sparse_model(), **options)
    assert abs(loss - LN2) < 1e-6
    assert layout["scoring"]["batches"]["padded"] > 1


def test_a_usual_run_s_record(tmp_path, capsys):
    _, layout = run(tmp_path, model=sharp_model(build_tokenizer()))
    for use in ("scoring", "training"):
        assert layout[use]["kind"] == "shared prefix"
        assert layout[use]["why"] == ""
        assert layout[use]["batches"]["shared prefix"] > 0
        assert not layout[use]["padding"]["right"]["times_rounding"] > 1
    shown = capsys.readouterr().out
    assert "in common" in shown
    assert "WARNING" not in shown


def test_a_refusal_s_reason_is_recorded(tmp_path):
    model = sharp_model(build_tokenizer())
    model.set_attn_implementation("eager")
    _, layout = run(tmp_path, model=model)
    assert "its attention (eager) takes no common beginning" in layout["training"]["why"]
