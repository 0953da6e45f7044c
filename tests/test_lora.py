"""objective=lora: low-rank adapters of a trained model."""

import pytest
import torch
from helpers import MICRO, bit_equal, metrics, random_data, run_state, write_recipe

import experiments
import export
from model import GPT
from nanostlm import checkpoint, settings
from nanostlm.variants import SHARES, LoRA, merge_lora
from train import TrainConfig, Trainer

RUN = dict(objective="lora", init_from="first", adapter_rank=2, max_iters=12, weight_decay=0.1)


def trainer(architecture: str = "gpt", **changes) -> Trainer:
    """A trainer with adapters in a model of random weights."""
    parts = experiments.architecture(architecture)[0], experiments.objective("lora")[0]
    cls = settings.with_parts(TrainConfig, model=parts[0], objective_config=parts[1])
    gpt = ("n_layer", "n_head", "n_embd") if architecture != "gpt" else ()
    values = {k: x for k, x in MICRO.items() if k not in gpt} | RUN | dict(vocab_size=257) | changes
    c = settings.build(cls, values | dict(architecture=architecture))
    torch.manual_seed(0)
    return Trainer(c, experiments.architecture(architecture)[1](c.model), random_data())


@pytest.fixture
def origin(main, tmp_path):
    """A finished micro run."""
    assert main("first", max_iters=3) == 0
    return tmp_path / "first"


@pytest.mark.parametrize("share", ["none", *SHARES])
def test_new_adapters_do_not_change_the_model(share):
    idx, changes = torch.randint(0, 257, (2, 16)), dict(share=share, pointer=True, bias=True, dropout=0.0)
    adapted = trainer(**changes).model.eval()
    torch.manual_seed(0)
    plain = GPT(adapted.config).eval()
    assert torch.equal(adapted(idx)[0], plain(idx)[0])
    assert any(isinstance(module, LoRA) for module in adapted.core.modules())


@pytest.mark.parametrize("share", ["none", *SHARES])
@torch.no_grad()
def test_merged_model_equals_the_adapted_one(share):
    """And layers that share a matrix share its adapter."""
    adapted = trainer(share=share, pointer=True, bias=True).model.double().eval()
    for p in adapted.parameters():
        p.copy_(torch.randn_like(p) * 0.3)
    merged = GPT(adapted.config).double().eval()
    merged.load_state_dict(merge_lora(adapted.state_dict(), merged.state_dict()))
    idx = torch.randint(0, 257, (3, 16))
    torch.testing.assert_close(merged(idx)[0], adapted(idx)[0], rtol=0, atol=1e-10)
    blocks = adapted.core.blocks
    assert (blocks[0].mlp.fc.up is blocks[1].mlp.fc.up) == (share in ("mlp", "layers"))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_only_adapters_are_trained(optimizer):
    t = trainer(pointer=True, tied=False, optimizer=optimizer)
    before = {name: x.clone() for name, x in t.model.state_dict().items()}
    for step in range(3):
        t.train_step(step)
    changed = {name for name, x in t.model.state_dict().items() if not torch.equal(x, before[name])}
    assert changed == {name for name in before if name.endswith((".down.weight", ".up.weight"))}
    assert len(changed) == 2 * 4 * 2  # two adapters of each of 4 matrices in 2 layers
    size = sum(before[name].numel() for name in changed)
    moments = [x for o in t.optimizers for s in o.state.values() for x in s.values() if x.ndim]
    assert sum(x.numel() for x in moments) == size * (1 if optimizer == "muon" else 2)
    assert not t.val_step()["loss"] == pytest.approx(trainer(pointer=True, tied=False).val_step()["loss"])


def test_resume_is_bitwise_exact(main, origin, tmp_path):
    """Settings of the objective and of the model come from the checkpoint."""
    changes = RUN | dict(dropout=0.1)
    assert main("whole", **changes) == 0
    assert main("parts", **changes, stop_after=7) == 143
    assert main("parts", "--resume", micro=False) == 0
    assert metrics("whole") == metrics("parts")
    assert bit_equal(run_state("whole"), run_state("parts"))
    assert bit_equal(run_state("whole", "best.pt"), run_state("parts", "best.pt"))
    assert main("parts", "--resume", micro=False, objective="lora", adapter_rank=3) == 2
    assert "adapter_rank: 2 -> 3" in main.stderr


def test_resume_by_recipe_after_an_objective_on_the_command_line(main, origin):
    recipe = write_recipe("micro")
    assert main("lora", recipe, micro=False, **RUN, stop_after=7) == 143
    assert main("lora", recipe, "--resume", micro=False) == 0
    assert run_state("lora")["step"] == 12 and "core.blocks.0.mlp.fc.up.weight" in run_state("lora")["model"]


def test_checkpoint_holds_all_and_loads_as_a_plain_model(main, origin, tmp_path):
    assert main("lora", **RUN) == 0
    assert "trains   0.001M parameters: adapters of 8 matrices" in main.stderr
    base, state = (checkpoint.read(run / "best.pt")["model"] for run in (origin, tmp_path / "lora"))
    model, tokenizer = checkpoint.load("lora")
    assert type(model) is GPT and not any(isinstance(module, LoRA) for module in model.modules())
    for name, weight in model.state_dict().items():
        layer = name.removesuffix(".weight")
        if f"{layer}.up.weight" in state:
            up, down = state[f"{layer}.up.weight"], state[f"{layer}.down.weight"]
            assert bit_equal(state[f"{layer}.base.weight"], base[name]) and up.abs().min() > 0
            torch.testing.assert_close(weight, base[name] + up @ down)
        else:
            assert bit_equal(weight, base[name]) and bit_equal(state[name], base[name])
    last = metrics("lora", "val")[-1]["loss"]
    assert main("plain", init_from="lora", max_iters=1) == 0
    assert metrics("plain", "val")[0]["loss"] == pytest.approx(last, rel=1e-5)
    assert main("again", **RUN | dict(init_from="lora")) == 0
    assert metrics("again", "val")[0]["loss"] == pytest.approx(last, rel=1e-5)

    transformers = pytest.importorskip("transformers")
    assert export.main(["--to", "hf", "hf", "lora"]) == 0
    theirs, idx = transformers.AutoModelForCausalLM.from_pretrained("hf"), torch.randint(0, 257, (2, 16))
    torch.testing.assert_close(theirs(idx).logits, model(idx)[0], rtol=0, atol=1e-5)


def test_refusals(main, origin):
    assert main("lora", objective="lora") == 2
    assert "objective=lora adapts a trained model: name it with --init_from" in main.stderr
    assert main("lora", **RUN | dict(adapter_rank=0)) == 2 and "adapter_rank must be between 1" in main.stderr
    assert main("lora", **RUN, compile="True") == 2 and "compile" in main.stderr
    assert not (origin.parent / "lora").exists()
    with pytest.raises(ValueError, match="leave out objective=lora: architecture=bigram has no core"):
        trainer("bigram")
