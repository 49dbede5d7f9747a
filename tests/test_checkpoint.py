"""checkpoint.py: strict loading, shards, aliases, atomic writing, one clear sentence per damaged file."""

import dataclasses
import json
import os
from dataclasses import dataclass, field

import pytest
import torch
from conftest import GOLDENS, V15, VARIANTS
from safetensors.torch import load_file, save_file
from torch import nn

import checkpoint
from checkpoint import atomic_write, save_component, save_weights, weight_files
from diffusion import Schedule
from run_folder import atomic_dir
from text_encoder import T5Encoder
from transformer import VideoTransformer
from vae import VideoVAE


@dataclass
class Config:
    width: int = 4
    scale: float = 1.0
    optional: int | None = None
    sizes: list[int] = field(default_factory=list)
    extra: dict = field(default_factory=dict)


class Net(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.a = nn.Linear(config.width, config.width)
        self.b = nn.Linear(config.width, 2, bias=False)


WEIGHTS = "diffusion_pytorch_model.safetensors"


def load_net(folder) -> Net:
    return checkpoint.load_component(Net, Config, folder, torch.float32, "cpu")


@pytest.mark.parametrize("variant", VARIANTS + V15)
def test_every_variant_loads_and_saves_back_to_the_same_tensors(variant, tmp_path):
    for cls, name in ((VideoVAE, "vae"), (VideoTransformer, "transformer"), (T5Encoder, "text_encoder")):
        cls.from_pretrained(GOLDENS / variant / name).save_pretrained(tmp_path)
        [before], [after] = ((root / name).glob("*.safetensors") for root in (GOLDENS / variant, tmp_path))
        assert before.name == after.name
        before, after = load_file(before), load_file(after)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[k].float(), after[k]) for k in before)  # a table may be stored in fp64


@pytest.mark.parametrize("shard_bytes, count", [(10**9, 1), (70, 2)])
def test_single_and_sharded_weights_load_alike(tmp_path, shard_bytes, count, monkeypatch):
    net = Net(Config())
    with monkeypatch.context() as patch:
        patch.setattr("checkpoint.MAX_SHARD_BYTES", shard_bytes)
        save_component(net, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == count
    again = load_net(tmp_path).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in net.state_dict().items())
    save_component(net, tmp_path)  # saving again with fewer shards leaves none of the old ones behind
    assert [p.name for p in tmp_path.glob("*.safetensors*")] == [WEIGHTS]


def test_weights_are_mapped_not_copied(tmp_path):
    """Growing by less than half of the file's 64 MiB shows that nothing was copied."""
    save_component(Net(Config(width=4096)), tmp_path)  # 64 MiB

    def resident():
        return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    net = load_net(tmp_path)
    assert net.a.weight.shape == (4096, 4096) and resident() - before < 32 * 2**20


UNFIT = {
    "missing: a.bias": {"a.bias": None},
    "unexpected: c": {"c": torch.zeros(1)},
    "mis-shaped: a.bias": {"a.bias": torch.zeros(5)},
    "a.bias is I8": {"a.bias": torch.zeros(4, dtype=torch.int8)},
}


@pytest.mark.parametrize("message", UNFIT)
def test_weights_that_do_not_match_are_not_loaded(tmp_path, message):
    state = Net(Config()).state_dict() | UNFIT[message]
    (tmp_path / "config.json").write_text("{}")
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=message):
        load_net(tmp_path)


def test_files_that_are_cut_or_missing_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("checkpoint.MAX_SHARD_BYTES", 70)
    save_component(Net(Config()), tmp_path)
    [index], [_, last] = tmp_path.glob("*.index.json"), sorted(tmp_path.glob("*.safetensors"))
    content = last.read_bytes()
    last.write_bytes(content[:-4])
    with pytest.raises(ValueError, match="truncated or not a safetensors"):
        load_net(tmp_path)
    last.unlink()
    with pytest.raises(FileNotFoundError, match=f"{last.name} is missing"):
        load_net(tmp_path)
    last.write_bytes(content)
    index.unlink()
    with pytest.raises(ValueError, match="2 weight files and no index"):
        load_net(tmp_path)


def test_a_config_takes_ints_for_floats_null_for_optional_and_keeps_the_unknown(tmp_path):
    (tmp_path / "config.json").write_text('{"scale": 2, "optional": null, "_class_name": "N", "later": [1]}')
    config = checkpoint.read_config(Config, tmp_path / "config.json")
    assert config == Config(scale=2, extra={"_class_name": "N", "later": [1]})
    save_component(Net(config), tmp_path / "again", _class_name="Other")
    content = json.loads((tmp_path / "again/config.json").read_text())
    assert content == {k: v for k, v in dataclasses.asdict(config).items() if k != "extra"} | config.extra


TRANSFORMER = (VideoTransformer, "transformer/config.json")
VAE = (VideoVAE, "vae/config.json")
T5 = (T5Encoder, "text_encoder/config.json")
SCHEDULE = (Schedule, "scheduler/scheduler_config.json")
MEANS_SOMETHING_ELSE = [
    (*TRANSFORMER, "activation_fn", "gelu"),
    (*TRANSFORMER, "flip_sin_to_cos", False),
    (*VAE, "act_fn", "gelu"),
    (*VAE, "temporal_compression_ratio", 8),
    (*VAE, "use_quant_conv", True),
    (*T5, "feed_forward_proj", "relu"),
    (*SCHEDULE, "prediction_type", "epsilon"),
    (*SCHEDULE, "timestep_spacing", "leading"),
    (*SCHEDULE, "rescale_betas_zero_snr", False),
]


@pytest.mark.parametrize("network, file, name, value", MEANS_SOMETHING_ELSE)
def test_a_config_that_would_compute_something_else_is_refused_by_name(tmp_path, network, file, name, value):
    official = json.loads((GOLDENS / "fun-2b-inp" / file).read_text())
    (tmp_path / file).parent.mkdir()
    (tmp_path / file).write_text(json.dumps(official | {name: value}))
    with pytest.raises(ValueError, match=f"{file}: .*{name} = "):
        network.from_pretrained(tmp_path)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("new")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_fails_leaves_the_old_folder_and_nothing_else(tmp_path):
    folder = tmp_path / "state"
    for text in ("first", "second"):
        with atomic_dir(folder) as temporary:
            (temporary / "a").mkdir()
            (temporary / "a/b.txt").write_text(text)
    with pytest.raises(RuntimeError), atomic_dir(folder) as temporary:
        (temporary / "c.txt").write_text("third")
        raise RuntimeError
    assert (folder / "a/b.txt").read_text() == "second"
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_weights_keep_their_values_whatever_their_strides(tmp_path):
    tensor = torch.randn(4, 6).t()
    save_weights({"a": tensor, "b": tensor[:2]}, tmp_path, "model")
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], tensor)
    assert weight_files(tmp_path) == dict.fromkeys(["a", "b"], tmp_path / "model.safetensors")


def test_of_several_variants_the_one_without_a_name_is_taken(tmp_path):
    def put(name: str) -> None:
        save_file({"a": torch.zeros(1)}, tmp_path / name)

    def index(name: str, shard: str) -> None:
        (tmp_path / name).write_text(json.dumps({"weight_map": {"a": shard}}))

    (tmp_path / "._model.safetensors").write_bytes(b"what macOS leaves on other disks")
    (tmp_path / "._model.safetensors.index.json").write_bytes(b"the same")
    put("model-00001-of-00001.fp16.safetensors")
    index("model.safetensors.index.fp16.json", "model-00001-of-00001.fp16.safetensors")
    assert weight_files(tmp_path)["a"].name == "model-00001-of-00001.fp16.safetensors"
    put("model.safetensors")
    assert weight_files(tmp_path)["a"].name == "model.safetensors"
    put("model-00001-of-00001.safetensors")
    index("model.safetensors.index.json", "model-00001-of-00001.safetensors")
    assert weight_files(tmp_path)["a"].name == "model-00001-of-00001.safetensors"
