from __future__ import annotations

import gc
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Florence2Config, Florence2ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from florence2_kserve import weights
from florence2_kserve.model_files import Layout, ModelFilesError, locate_model
from florence2_kserve.weights import (
    LoadedModel,
    find_device,
    fingerprint,
    load_model,
    native_config,
    native_key,
    read_generation_settings,
)
from tests import shadow

NATIVE_TIED = [native_key(key) for key in shadow.TIED]


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shadow.write_native(tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shadow.write_original(tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="module")
def folders(native: Path, original: Path) -> dict[Layout, Path]:
    return {Layout.NATIVE: native, Layout.ORIGINAL: original}


@pytest.fixture(scope="module")
def loaded(folders: dict[Layout, Path]) -> dict[Layout, LoadedModel]:
    return {layout: load(folder) for layout, folder in folders.items()}


@pytest.fixture
def edited(tmp_path: Path) -> Callable[..., Path]:
    """Copies a folder and updates JSON files in it."""

    def _edited(folder: Path, **changes: dict[str, Any]) -> Path:
        copy = Path(shutil.copytree(folder, tmp_path / "edited"))
        for name, change in changes.items():
            path = copy / f"{name}.json"
            path.write_text(json.dumps(merged(json.loads(path.read_text()), change)))
        return copy

    return _edited


def merged(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for name, value in change.items():
        result[name] = merged(base[name], value) if isinstance(value, dict) and name in base else value
    return result


def load(folder: Path, **options: str) -> LoadedModel:
    return load_model(locate_model(str(folder)), **options)


def writer(layout: Layout) -> Callable[..., Path]:
    return shadow.write_native if layout is Layout.NATIVE else shadow.write_original


def outputs(model: Florence2ForConditionalGeneration, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Returns what the oracle recorded of Microsoft's code, all of it."""
    side = inputs["image_size"]
    pixels = torch.from_numpy(shadow.draw("pixel_values", [2, 3, side, side])).to(model.dtype)
    with torch.inference_mode():
        features = model.get_image_features(pixels).pooler_output
        text = model.get_input_embeddings()(torch.tensor(inputs["input_ids"]))
        embeddings = torch.cat([features, text], dim=1)
        states = model.model.language_model.encoder(inputs_embeds=embeddings).last_hidden_state
        logits = model(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            decoder_input_ids=torch.tensor(inputs["decoder_input_ids"]),
            use_cache=False,
        ).logits
    return {"image_features": features, "encoder_states": states, "logits": logits}


def error_against(oracle: dict[str, Any], found: dict[str, torch.Tensor]) -> dict[str, float]:
    picked = {
        name: found[name][:, oracle[name]["tokens"], :: oracle[name]["every"]]
        for name in ("image_features", "encoder_states")
    }
    picked["logits"] = found["logits"][..., oracle["logits"]["columns"]]
    return {
        name: float(np.abs(tensor.flatten().numpy() - np.array(oracle[name]["values"])).max())
        for name, tensor in picked.items()
    }


@pytest.mark.parametrize("layout", list(Layout))
def test_it_computes_what_microsofts_code_computes(loaded, layout):
    oracle = shadow.read_oracle(shadow.SMALL)
    found = outputs(loaded[layout].model, oracle["inputs"])
    errors = error_against(oracle, found)
    assert max(errors.values()) < 1e-5, errors
    logits = found["logits"][..., : shadow.ORIGINAL_VOCAB_SIZE].double()
    assert float(logits.pow(2).mean()) == pytest.approx(oracle["logits"]["mean_square"], rel=1e-6)


@pytest.mark.parametrize("layout", list(Layout))
def test_it_generates_what_microsofts_code_generates(loaded, layout):
    oracle = shadow.read_oracle(shadow.SMALL)
    model = loaded[layout].model
    states = outputs(model, oracle["inputs"])["encoder_states"]
    for state, expected in zip(states, oracle["generated"], strict=True):
        tokens = model.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=state[None]),
            attention_mask=torch.ones(1, len(state), dtype=torch.long),
            max_new_tokens=oracle["inputs"]["max_new_tokens"],
        )
        assert tokens[0].tolist() == expected


def test_both_layouts_give_the_same_model(loaded):
    one, other = (loaded[layout].model.state_dict() for layout in (Layout.ORIGINAL, Layout.NATIVE))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        theirs = other[name][: len(tensor)] if name in NATIVE_TIED else other[name]
        assert torch.equal(tensor, theirs), name
    assert {name: tensor.stride() for name, tensor in one.items()} == {
        name: tensor.stride() for name, tensor in other.items()
    }


def test_the_native_model_is_that_of_transformers(native, loaded):
    theirs = Florence2ForConditionalGeneration(Florence2Config.from_pretrained(native))
    report = theirs.load_state_dict(load_file(native / "model.safetensors"), strict=False)
    assert report.unexpected_keys == []
    assert set(report.missing_keys) == set(NATIVE_TIED[1:])
    theirs.eval()
    inputs = shadow.read_oracle(shadow.SMALL)["inputs"]
    ours = outputs(loaded[Layout.NATIVE].model, inputs)
    for name, tensor in outputs(theirs, inputs).items():
        assert torch.equal(tensor, ours[name]), name


@pytest.mark.parametrize("size", [shadow.SMALL, shadow.BASE, shadow.LARGE], ids=lambda size: size.name)
def test_every_key_of_microsofts_code_finds_its_place(size):
    with torch.device("meta"):
        model = Florence2ForConditionalGeneration(native_config(shadow.original_config(size)))
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {}
    for key, shape in shadow.original_shapes(size).items():
        name = native_key(key)
        if name is not None:
            assert name not in found
            found[name] = shape[::-1] if key == "image_projection" else shape
        else:
            assert key == "language_model.final_logits_bias"
    assert found == expected


def test_the_embedded_model_loads():
    found = load_model(locate_model())
    assert found.layout is Layout.NATIVE
    assert sum(path.stat().st_size for path in locate_model().weight_files) < 16 * 2**20
    assert found.model.get_image_features(torch.zeros(1, 3, 96, 96)).pooler_output.shape[:2] == (
        1,
        found.image_seq_length(96, 96),
    )


@pytest.mark.parametrize("layout", list(Layout))
def test_shards_make_the_same_model(layout, folders, loaded, tmp_path):
    sharded = load(writer(layout)(tmp_path, shards=3)).model.state_dict()
    for name, tensor in loaded[layout].model.state_dict().items():
        assert torch.equal(sharded[name], tensor), name


def test_a_folder_saved_by_transformers_5_makes_the_same_model(loaded, tmp_path):
    saved = load(shadow.write_native(tmp_path, saved_by=5))
    assert saved.generation == loaded[Layout.NATIVE].generation
    for name, tensor in loaded[Layout.NATIVE].model.state_dict().items():
        assert torch.equal(saved.model.state_dict()[name], tensor), name


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("stored", [*((key,) for key in shadow.TIED), shadow.TIED])
def test_tied_weights_may_be_stored_under_any_of_their_names(layout, stored, loaded, tmp_path):
    def keep(tensors: dict[str, Any]) -> None:
        names = stored if layout is Layout.ORIGINAL else [native_key(key) for key in stored]
        shared = tensors.pop(shadow.SHARED if layout is Layout.ORIGINAL else NATIVE_TIED[0])
        tensors.update(dict.fromkeys(names, shared))

    model = load(writer(layout)(tmp_path, change=keep)).model
    embeddings = [model.get_parameter(name) for name in NATIVE_TIED]
    assert all(parameter is embeddings[0] for parameter in embeddings)
    assert torch.equal(embeddings[0], loaded[layout].model.lm_head.weight)


@pytest.mark.parametrize("layout", list(Layout))
def test_tied_weights_that_differ_are_refused(layout, tmp_path):
    key, other = (shadow.SHARED, shadow.TIED[1]) if layout is Layout.ORIGINAL else NATIVE_TIED[:2]

    def change(tensors: dict[str, Any]) -> None:
        tensors[other] = tensors[key] + tensors[key].dtype.type(1)

    with pytest.raises(ModelFilesError, match="embeddings"):
        load(writer(layout)(tmp_path, change=change))


@pytest.mark.parametrize(
    ("layout", "absent", "named"),
    [
        (Layout.ORIGINAL, "image_projection", "multi_modal_projector.image_projection.weight"),
        (Layout.ORIGINAL, shadow.SHARED, "lm_head.weight"),
        (
            Layout.ORIGINAL,
            "vision_tower.blocks.2.1.channel_block.channel_attn.norm.bias",
            "model.vision_tower.blocks.2.1.channel_block.norm1.bias",
        ),
        (Layout.NATIVE, "model.language_model.decoder.layers.2.fc1.bias", "decoder.layers.2.fc1.bias"),
        (Layout.NATIVE, NATIVE_TIED[0], "model.language_model.shared.weight"),
    ],
)
def test_missing_weights_are_named(layout, absent, named, tmp_path):
    folder = writer(layout)(tmp_path, change=lambda tensors: tensors.pop(absent))
    with pytest.raises(ModelFilesError, match=f"missing: .*{named}"):
        load(folder)


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("key", ["lora.down.weight", "language_model.model.encoder.layers.2.fc1.bias"])
def test_unknown_weights_are_named(layout, key, tmp_path):
    if layout is Layout.NATIVE:
        key = native_key(key) or key

    def change(tensors: dict[str, Any]) -> None:
        tensors[key] = np.zeros(96, dtype=np.float16)

    with pytest.raises(ModelFilesError, match=f"unknown: {key}"):
        load(writer(layout)(tmp_path, change=change))


@pytest.mark.parametrize(
    ("layout", "key", "named"),
    [
        (Layout.ORIGINAL, "image_projection", r"image_projection \[64, 80\], expected \[80, 64\]"),
        (Layout.NATIVE, native_key("image_projection"), r"image_projection.weight \[80, 64\], expected \[64, 80\]"),
    ],
)
def test_weights_of_another_shape_are_named(layout, key, named, tmp_path):
    def change(tensors: dict[str, Any]) -> None:
        tensors[key] = np.ascontiguousarray(tensors[key].T)

    with pytest.raises(ModelFilesError, match=f"of another shape: {named}|of another shape: .*{named}"):
        load(writer(layout)(tmp_path, change=change))


@pytest.mark.parametrize("layout", list(Layout))
def test_a_config_of_another_size_does_not_fit(layout, folders, edited):
    folder = edited(folders[layout], config={"text_config": {"encoder_layers": 3, "num_hidden_layers": 3}})
    with pytest.raises(ModelFilesError, match=r"missing: model\.language_model\.encoder\.layers\.2\..* and 6 more"):
        load(folder)


def test_a_bias_of_the_logits_is_refused_unless_it_is_zero(tmp_path):
    key = "language_model.final_logits_bias"

    def change(tensors: dict[str, Any]) -> None:
        tensors[key] = tensors[key] + np.float16(0.5)

    with pytest.raises(ModelFilesError, match=f"{key} .*isn't zero"):
        load(shadow.write_original(tmp_path / "biased", change=change))
    load(shadow.write_original(tmp_path / "without", change=lambda tensors: tensors.pop(key)))


@pytest.mark.parametrize("layout", list(Layout))
def test_the_temporal_embedding_is_computed_where_it_is_absent(layout, loaded, tmp_path):
    key = "visual_temporal_embed.pos_idx_to_embed"
    name = key if layout is Layout.ORIGINAL else native_key(key)
    model = load(writer(layout)(tmp_path, change=lambda tensors: tensors.pop(name))).model
    computed = model.state_dict()[native_key(key)]
    assert torch.allclose(computed, loaded[layout].model.state_dict()[native_key(key)], atol=5e-4)
    assert torch.equal(computed[0, :4], torch.tensor([0.0, 1.0, 0.0, 1.0]))


def test_integers_are_no_weights(tmp_path):
    def change(tensors: dict[str, Any]) -> None:
        tensors["image_projection"] = tensors["image_projection"].astype(np.int8)

    with pytest.raises(ModelFilesError, match=r"image_projection .* is stored as torch\.int8"):
        load(shadow.write_original(tmp_path, change=change))


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("keep", [4, 1_000_000])
def test_a_file_cut_short_is_named(layout, keep, folders, edited):
    path = edited(folders[layout]) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelFilesError, match=r"can't be (read|loaded)"):
        load(path.parent)


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("float16", torch.float16), ("bfloat16", torch.bfloat16), ("auto", torch.float16)],
)
def test_weights_get_the_data_type_asked_for(layout, dtype, expected, folders, loaded):
    found = load(folders[layout], dtype=dtype)
    assert found.dtype is expected
    reference = loaded[layout].model.state_dict()
    for name, tensor in found.model.state_dict().items():
        assert tensor.dtype is expected, name
        assert torch.equal(tensor, reference[name].to(expected)), name


@pytest.mark.parametrize("layout", list(Layout))
def test_auto_takes_the_stored_data_type(layout, folders, edited):
    path = edited(folders[layout]) / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    assert load(path.parent, dtype="auto").dtype is torch.bfloat16
    save_file({name: tensor.double() for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="'auto' needs weights in float32, float16, bfloat16, not F64"):
        load(path.parent, dtype="auto")


def test_other_data_types_and_devices_are_refused(native):
    with pytest.raises(ValueError, match="dtype 'int8' is unknown; known are float32, float16, bfloat16 and auto"):
        load(native, dtype="int8")
    with pytest.raises(ValueError, match="device 'tpu' is unknown; known are cpu, cuda, cuda:N and auto"):
        load(native, device="tpu")


def test_cuda_is_never_replaced_unless_auto_was_asked_for(native, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="device 'cuda' was asked for, but"):
        load(native, device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device("auto") == torch.device("cuda")
    assert find_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="device 'cuda:2' was asked for, but only 2 GPUs are visible"):
        find_device("cuda:2")


@pytest.mark.parametrize("layout", list(Layout))
def test_the_model_is_ready_to_run(layout, folders, loaded):
    found = loaded[layout]
    assert found.dtype is torch.float32
    assert not found.model.training
    assert not any(parameter.requires_grad for parameter in found.model.parameters())
    assert all(tensor.device.type == "cpu" for tensor in found.model.state_dict().values())
    assert (found.device.type, found.layout, found.reference) == ("cpu", layout, str(folders[layout]))
    vocab_size = shadow.NATIVE_VOCAB_SIZE if layout is Layout.NATIVE else shadow.ORIGINAL_VOCAB_SIZE
    assert (found.vocab_size, found.max_source_positions, found.max_target_positions) == (vocab_size, 256, 256)
    for name, value in found.generation.to_transformers().items():
        assert getattr(found.model.generation_config, name) == value


def test_no_prompt_can_hold_the_image_token_of_the_original_layout(loaded):
    found = loaded[Layout.ORIGINAL]
    assert found.model.config.image_token_id == found.vocab_size


def test_image_seq_length_follows_the_strides(loaded):
    found = loaded[Layout.NATIVE]
    assert found.image_seq_length(768, 768) == 577
    assert found.image_seq_length(96, 64) == 3 * 2 + 1
    pixels = torch.zeros(1, 3, 96, 64)
    assert found.model.get_image_features(pixels).pooler_output.shape[1] == found.image_seq_length(96, 64)
    with pytest.raises(ValueError, match="images of 96x1664 pixels give 3x52 cells; this model takes 1 to 50"):
        found.image_seq_length(1664, 96)


def test_weights_are_needed(native):
    with pytest.raises(ModelFilesError, match="located without its weights"):
        load_model(locate_model(str(native), with_weights=False))


def test_code_beside_the_weights_is_never_run(original, edited, tmp_path):
    marker = tmp_path / "ran"
    folder = edited(original)
    for name in ("modeling_florence2.py", "configuration_florence2.py", "processing_florence2.py"):
        (folder / name).write_text(f"open({str(marker)!r}, 'w').close()\n")
    load(folder)
    assert not marker.exists()


@pytest.mark.parametrize("layout", list(Layout))
def test_generation_settings(layout, folders, caplog):
    with caplog.at_level(logging.INFO, logger="florence2_kserve.weights"):
        settings = read_generation_settings(locate_model(str(folders[layout])))
    assert settings.to_transformers() == {
        "decoder_start_token_id": 2,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "forced_bos_token_id": 0,
        "forced_eos_token_id": 2,
        "no_repeat_ngram_size": 3,
        "num_beams": 3,
        "length_penalty": 1.0,
        "early_stopping": True,
    }
    source = "generation_config.json" if layout is Layout.NATIVE else "text_config in config.json"
    followed, *rest = caplog.messages
    assert f"follow {source}: GenerationSettings(" in followed
    if layout is Layout.ORIGINAL:
        assert rest == [
            "not followed from generation_config.json, as it has no effect in this layout: {'early_stopping': False}"
        ]
    else:
        assert rest == []


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
def test_each_layout_keeps_what_its_own_file_says(early_stopping, folders, edited):
    changed = edited(
        folders[Layout.NATIVE],
        generation_config={
            "early_stopping": early_stopping,
            "num_beams": 5,
            "length_penalty": 2,
            "forced_eos_token_id": [2],
        },
    )
    settings = read_generation_settings(locate_model(str(changed)))
    assert (settings.early_stopping, settings.num_beams, settings.length_penalty) == (early_stopping, 5, 2.0)
    assert settings.forced_eos_token_id == 2
    shutil.rmtree(changed)
    changed = edited(folders[Layout.ORIGINAL], config={"text_config": {"early_stopping": early_stopping}})
    assert read_generation_settings(locate_model(str(changed))).early_stopping == early_stopping


def test_what_a_file_leaves_out_is_transformers_default(native, edited):
    folder = edited(native)
    (folder / "generation_config.json").write_text(json.dumps({"decoder_start_token_id": 2, "num_beams": None}))
    with pytest.raises(ModelFilesError, match="says nowhere what bos_token_id is"):
        read_generation_settings(locate_model(str(folder)))
    ids = {"decoder_start_token_id": 2, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    (folder / "generation_config.json").write_text(json.dumps(ids))
    settings = read_generation_settings(locate_model(str(folder)))
    assert (settings.num_beams, settings.no_repeat_ngram_size, settings.early_stopping) == (1, 0, False)
    assert settings.forced_bos_token_id is settings.forced_eos_token_id is None


def test_settings_that_are_not_followed_are_warned_of(native, edited, caplog):
    folder = edited(native, generation_config={"do_sample": True, "repetition_penalty": 1.3, "min_length": 0})
    read_generation_settings(locate_model(str(folder)))
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.endswith("that are not followed: {'do_sample': True, 'repetition_penalty': 1.3}")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"pad_token_id": 60_000}, "pad_token_id of .* is 60000; its vocabulary has 51328 entries"),
        ({"eos_token_id": [1, 2]}, r"eos_token_id of .* is \[1, 2\]; one token id is expected"),
        ({"forced_bos_token_id": "<s>"}, "forced_bos_token_id of .* is '<s>'; one token id is expected"),
        ({"early_stopping": "sometimes"}, "early_stopping of .* is 'sometimes'"),
        ({"num_beams": 0}, "make no sense: .*num_beams=0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, named, native, edited):
    with pytest.raises(ModelFilesError, match=named):
        load(edited(native, generation_config=change))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"image_feature_source": ["last_frame"]}, r"vision_config.image_feature_source is \['last_frame'\]"),
        ({"image_pos_embed": {"type": "sine"}}, "vision_config.image_pos_embed.type is 'sine'"),
        ({"visual_temporal_embedding": {"type": "LEARNED"}}, "visual_temporal_embedding.type is 'LEARNED'"),
        ({"patch_prenorm": [True, True, True, True]}, r"patch_prenorm\[0\] is True"),
        ({"projection_dim": 32}, "weights of .* don't fit"),
        ({"num_heads": "many"}, "does not describe a Florence-2"),
    ],
)
def test_another_architecture_is_refused(change, named, original, edited):
    with pytest.raises(ModelFilesError, match=named):
        load(edited(original, config={"vision_config": change}))


def test_a_field_that_is_missing_is_named(original):
    config = shadow.original_config(shadow.SMALL)
    del config["vision_config"]["window_size"]
    with pytest.raises(ModelFilesError, match="KeyError: 'window_size'"):
        native_config(config)


def test_a_projection_to_another_width_is_refused(native):
    config = native_config(shadow.original_config(replace(shadow.SMALL, d_model=32)))
    config.vision_config.projection_dim = 64
    files = locate_model(str(native))
    with pytest.raises(ModelFilesError, match="projects images to 64 dimensions, but its text model has 32"):
        weights._check(files, config, read_generation_settings(files))


def test_a_config_saved_by_a_fine_tune_is_read_alike():
    config = shadow.original_config(shadow.SMALL)
    config["vision_config"]["model_type"] = ""
    config["text_config"] |= {"model_type": "florence2_language", "bad_words_ids": None, "vocab_size": None}
    assert native_config(config).to_dict() == native_config(shadow.original_config(shadow.SMALL)).to_dict()


@pytest.mark.parametrize("whole_file_up_to", [weights._WHOLE_HASH_BYTES, 0])
@pytest.mark.parametrize("layout", list(Layout))
def test_the_fingerprint_is_of_the_contents(layout, whole_file_up_to, folders, edited, monkeypatch):
    monkeypatch.setattr(weights, "_WHOLE_HASH_BYTES", whole_file_up_to)
    before = fingerprint(locate_model(str(folders[layout])))
    copy = edited(folders[layout])
    assert fingerprint(locate_model(str(copy))) == before

    path = copy / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("encoder.layers.1.self_attn.q_proj.weight"))
    tensors[name][32, 32] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    changed = fingerprint(locate_model(str(copy)))
    assert changed != before

    config = json.loads((copy / "config.json").read_text())
    config["vision_config"]["window_size"] = 6
    (copy / "config.json").write_text(json.dumps(config))
    assert fingerprint(locate_model(str(copy))) not in (before, changed)


def test_progress_bars_stay_as_they_were(native, monkeypatch):
    from transformers.utils import logging as transformers_logging

    for enabled in (True, False):
        (transformers_logging.enable_progress_bar if enabled else transformers_logging.disable_progress_bar)()
        load(native)
        assert transformers_logging.is_progress_bar_enabled() is enabled
    transformers_logging.enable_progress_bar()


FULL_SIZE = """
import json, re, sys
from pathlib import Path
from florence2_kserve.model_files import locate_model
from florence2_kserve.weights import load_model
from tests import shadow
from tests.test_weights import error_against, outputs

loaded = load_model(locate_model(sys.argv[1]), dtype=sys.argv[3])
# Not ru_maxrss: that begins with the peak of the process which started this one.
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20
oracle = shadow.read_oracle({"base": shadow.BASE, "large": shadow.LARGE}[sys.argv[2]])
errors = error_against(oracle, outputs(loaded.model, oracle["inputs"])) if sys.argv[3] == "float32" else {}
parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
print(json.dumps({"peak_gib": peak, "errors": errors, "parameters": parameters}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize(
    ("size", "parameters", "most_gib"),
    [
        pytest.param(shadow.BASE, 231e6, 3, id="base"),
        pytest.param(shadow.LARGE, 777e6, 8, id="large", marks=pytest.mark.full),
    ],
)
def test_full_size(size, parameters, most_gib, layout, dtype, tmp_path):
    folder = writer(layout)(tmp_path / "model", size)
    gc.collect()
    try:
        result = subprocess.run(
            [sys.executable, "-c", FULL_SIZE, str(folder), size.name, dtype],
            cwd=Path(weights.__file__).parent.parent,
            capture_output=True,
            text=True,
            timeout=1200,
            check=False,
        )
    finally:
        shutil.rmtree(folder)  # gigabytes, which pytest would keep for a while
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    print(report)
    assert report["parameters"] == pytest.approx(parameters, rel=0.01)
    assert report["peak_gib"] < most_gib
    assert max(report["errors"].values(), default=0) < 1e-4
