"""Models that cannot be recorded say so, and why."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch import nn  # noqa: E402

from basis.errors import InputError  # noqa: E402
from traces.record_model import record  # noqa: E402

TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
PAIR = {
    "vocab_size": 64, "d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 2, "num_heads": 2,
    "num_decoder_layers": 2, "encoder_layers": 2, "decoder_layers": 2, "num_experts": 4,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1,
}  # fmt: skip
IDS = torch.tensor([[5, 9, 11, 4]])


def build(family, **settings):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(family, **(TEXT | settings))
    ).eval()


@pytest.mark.parametrize("family", ["switch_transformers", "nllb-moe"])
def test_encoder_decoders(family, tmp_path):
    config = transformers.AutoConfig.for_model(family, **PAIR)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
    with pytest.raises(InputError, match="encoder-decoder"), record(model, tmp_path / "a.parquet"):
        pass


@torch.no_grad()
def test_jetmoe_never_calls_a_module_named_experts(tmp_path):
    model = build("jetmoe", num_local_experts=4, num_experts_per_tok=2, kv_channels=8)
    with (
        pytest.raises(InputError, match="2 of 2 MoE layers were not seen"),
        record(model, tmp_path / "a.parquet"),
    ):
        model(IDS)
    assert list(tmp_path.iterdir()) == []


@torch.no_grad()
def test_a_router_that_skips_is_no_choice_of_an_expert(tmp_path):
    model = build("zaya", num_experts=4, num_experts_per_tok=1, head_dim=8)
    for module in model.modules():
        if hasattr(module, "balancing_biases"):
            module.balancing_biases[-1] = 5.0  # the class that means: no expert
    with (
        pytest.raises(InputError, match="chosen with weight 0"),
        record(model, tmp_path / "a.parquet"),
    ):
        model(IDS)


def test_a_dense_model_has_no_layers_to_record(tmp_path):
    with pytest.raises(InputError, match="0 modules"), record(build("llama"), tmp_path / "a"):
        pass


def test_phimoes_weights_are_no_scores(tmp_path):
    model = build("phimoe", num_local_experts=8)
    with (
        torch.no_grad(),
        pytest.raises(InputError, match="none of them gives the weights"),
        record(model, tmp_path / "a.parquet", candidates=4),
    ):
        model(IDS)


@pytest.mark.parametrize(("count", "message"), [(2, "allowed are 3"), (9, r"to 8 \(all")])
def test_candidates_are_more_than_top_k_and_at_most_all(count, message, tmp_path):
    model = build("mixtral")
    with (
        torch.no_grad(),
        pytest.raises(InputError, match=message),
        record(model, tmp_path / "a.parquet", candidates=count),
    ):
        model(IDS)


def test_models_whose_hooks_do_not_run_or_ids_are_local(tmp_path):
    parallel, compiled = build("mixtral"), build("mixtral")
    parallel.model.layers[1].mlp.experts._is_expert_parallel = True
    with pytest.raises(InputError, match="expert parallelism"), record(parallel, tmp_path / "a"):
        pass
    compiled.compile(backend="eager")
    with pytest.raises(InputError, match="compiled"), record(compiled, tmp_path / "a"):
        pass
    with (
        pytest.raises(InputError, match="compiled"),
        record(torch.compile(build("mixtral"), backend="eager"), tmp_path / "a"),
    ):
        pass


class Layer(nn.Module):
    """A layer that calls its experts as it is told to."""

    def __init__(self, call, router):
        super().__init__()
        self.call, self.router = call, router
        self.experts = nn.Module()
        self.experts.num_experts = 4
        self.experts.forward = lambda *args, **kwargs: None

    def forward(self, x):
        self.call(self.experts, self.router, x.flatten(0, 1))
        return x


class Model(nn.Module):
    def __init__(self, call, router=None, layers=1):
        super().__init__()
        self.layers = nn.ModuleList(Layer(call, router) for _ in range(layers))

    def forward(self, input_ids):
        x = torch.ones(*input_ids.shape, 6)
        for layer in self.layers:
            x = layer(x)
        return x


ID = torch.tensor([[0, 1]] * 4)
WEIGHT = torch.full((4, 2), 0.5)
CALLS = {
    "one-hot masks, as in Switch": (
        lambda experts, _, x: experts(x, torch.eye(4, dtype=torch.long)[:, None], torch.ones(4, 1)),
        r"shape \(4, 1, 4\)",
    ),
    "a mask of all experts, as in NLLB": (
        lambda experts, _, x: experts(x, torch.eye(4, dtype=torch.long), torch.eye(4)),
        "the same expert twice",
    ),
    "groups, as in Aria of 5.0": (
        lambda experts, _, x: experts(x, torch.tensor([2, 2])),
        "without top_k_index and top_k_weights",
    ),
    "every token, nobody says which": (
        lambda experts, _, x: experts(x),
        "without top_k_index and top_k_weights",
    ),
    "ids that are too large": (
        lambda experts, _, x: experts(x, ID + 3, WEIGHT),
        "expert ids 3 to 4 -- allowed are 0 to 3",
    ),
    "a sentinel twice, as under expert parallelism of 5.0": (
        lambda experts, _, x: experts(x, torch.full((4, 2), 3), WEIGHT),
        "the same expert twice",
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_ways_of_calling_experts_that_are_not_understood(call, tmp_path):
    run, message = CALLS[call]
    model = Model(run)
    with pytest.raises(InputError, match=message), record(model, tmp_path / "a.parquet"):
        model(IDS)


class DenseRouter(nn.Module):
    """Gives scores of all experts and logits; the scores of ``kept`` experts are not 0."""

    top_k = 1

    def __init__(self, kept):
        super().__init__()
        self.kept = kept

    def forward(self, x):
        logits = torch.arange(4.0).repeat(len(x), 1)
        scores = torch.zeros(len(x), 4)
        scores[:, 4 - self.kept :] = 0.5
        return scores, logits


def test_dense_scores_must_be_those_of_the_choice(tmp_path):
    def call(experts, router, x):
        router(x)
        experts(x)

    model = Model(call, DenseRouter(kept=2))
    with (
        pytest.raises(InputError, match="get every token"),
        record(model, tmp_path / "a.parquet"),
    ):
        model(IDS)


def test_layers_must_agree(tmp_path):
    def call(experts, _, x):
        wide = experts is model.layers[1].experts
        experts(x, ID if wide else ID[:, :1], WEIGHT if wide else WEIGHT[:, :1])

    model = Model(call, layers=2)
    with pytest.raises(InputError, match="choose differently"), record(model, tmp_path / "a"):
        model(IDS)
    model.layers[1].experts.num_experts = 8
    with pytest.raises(InputError, match=r"say \['4', '8'\]"), record(model, tmp_path / "a"):
        pass
