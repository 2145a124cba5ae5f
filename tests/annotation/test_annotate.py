"""The annotator: dense logits against hand-made ones, the probe, and stores that resume and shard."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import tl_fast.system.torchvision_shim  # noqa: F401  before timm and torchvision

# isort: split
import timm
from tiny_runs import torchrun

from tl_fast.annotate import main
from tl_fast.annotation import linear_probe
from tl_fast.annotation.annotator import AnnotateError, Annotator, Preprocessing
from tl_fast.annotation.run import AnnotateConfig, annotate
from tl_fast.annotation.weights import build_annotator
from tl_fast.labelmaps import store as map_store
from tl_fast.labelmaps.format import MapSpec, unpack
from tl_fast.labelmaps.store import LabelMapStore
from tl_fast.models.build import build_model
from tl_fast.sources.image_folder import ImageFolderError, list_images
from tl_fast.training import checkpoint
from tl_fast.training.config import TrainConfig

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def lite0() -> Annotator:
    return build_annotator("efficientnet-lite0", img_size=96)


def randomised(name: str, **arguments) -> nn.Module:
    """A timm model none of whose layers is at its initial zeros or ones."""
    torch.manual_seed(0)
    network = timm.create_model(name, **arguments).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def wrap(network: nn.Module, name: str, size: int) -> Annotator:
    preprocessing = Preprocessing(size, "bicubic", (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    return Annotator(network, preprocessing, name=name, source="random", device=torch.device("cpu"))


def dense_and_features(network: nn.Module, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Annotator's dense and pooled logits of two random images, and the network's features of them, computed apart."""
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    annotator = wrap(network, "x", size)
    x = (images.float() / 255 - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(
        3, 1, 1
    )
    with torch.inference_mode():
        dense, pooled = annotator(images)
        torch.testing.assert_close(pooled, network(x), rtol=1e-4, atol=1e-4)
        assert dense.shape == (2, annotator.num_classes, *annotator.grid)
        return dense, pooled, network.forward_features(x)


def test_bundled_network_is_a_classifier_whose_cells_average_to_the_image(lite0, photos):
    files = sorted((photos / "val").rglob("*.jpg"))[::6]
    squashed = np.stack(
        [np.array(Image.open(file).convert("RGB").resize((96, 96), Image.Resampling.BICUBIC)) for file in files]
    )
    with torch.inference_mode():
        dense, pooled = lite0(torch.from_numpy(squashed).permute(0, 3, 1, 2))
    assert dense.shape == (len(files), 1000, 3, 3)
    torch.testing.assert_close(dense.mean((2, 3)), pooled, rtol=0, atol=1e-4)
    assert (
        pooled.softmax(1).amax(1) > 0.3
    ).float().mean() > 0.4  # trained weights in the right places: sure of several photos


@pytest.mark.parametrize(
    "arguments,prefix",
    [
        (dict(), 1),
        (dict(global_pool="avg"), 1),
        (dict(reg_tokens=4), 5),
        (dict(reg_tokens=4, global_pool="avg"), 5),
        (dict(class_token=False, global_pool="avg", patch_size=(16, 32)), 0),  # 4 x 2 cells
    ],
)
def test_vit_tokens_are_classified_one_by_one(arguments, prefix):
    network = randomised("vit_tiny_patch16_224", img_size=64, num_classes=7, depth=2, **arguments)
    dense, _, features = dense_and_features(network, 64)
    height, width = 4, 64 // network.patch_embed.patch_size[1]
    assert dense.shape[2:] == (height, width)
    for row in range(height):
        for column in range(width):
            token = features[:, prefix + row * width + column]
            torch.testing.assert_close(
                dense[:, :, row, column], network.head(network.fc_norm(token)), rtol=1e-4, atol=1e-5
            )


def test_token_head_classifies_the_tokens():
    network = randomised("lvvit_t", img_size=64, num_classes=7, embed_dim=32, depth=2, num_heads=2, stem_width=8)
    dense, _, features = dense_and_features(network, 64)
    torch.testing.assert_close(
        dense.flatten(2).transpose(1, 2), network.aux_head(features[:, 1:]), rtol=1e-4, atol=1e-5
    )


def test_channels_last_hierarchy():
    network = randomised(
        "swin_tiny_patch4_window7_224", img_size=64, window_size=2, embed_dim=24, depths=(1, 1, 1, 1), num_classes=7
    )
    dense, pooled, features = dense_and_features(network, 64)  # features [B, 2, 2, D]
    torch.testing.assert_close(dense.permute(0, 2, 3, 1), network.head.fc(features), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dense.mean((2, 3)), pooled, rtol=1e-4, atol=1e-4)


def test_layers_between_pooling_and_classifier_are_applied_to_each_cell():
    network = randomised("convnext_atto", num_classes=7)
    dense, _, features = dense_and_features(network, 64)  # features [B, D, 2, 2]
    channels = features.permute(0, 2, 3, 1)
    norm = network.head.norm
    expected = network.head.fc(
        nn.functional.layer_norm(channels, channels.shape[-1:], norm.weight, norm.bias, norm.eps)
    )
    torch.testing.assert_close(dense.permute(0, 2, 3, 1), expected, rtol=1e-4, atol=1e-4)

    network = randomised("mobilenetv3_small_050", num_classes=7)
    dense, _, features = dense_and_features(network, 64)
    expected = network.classifier(network.act2(network.norm_head(network.conv_head(features))).permute(0, 2, 3, 1))
    torch.testing.assert_close(dense.permute(0, 2, 3, 1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["pit_ti_224", "coat_tiny"])  # no patch tokens in the features; a list of maps
def test_networks_without_a_map_are_refused(name):
    with pytest.raises(AnnotateError, match=f"model {name}.*(no single map|form no grid|every cell)"):
        wrap(timm.create_model(name), name, 224)


def test_features_that_are_no_tensor_are_refused_by_the_models_name():
    """After construction too, which looks at two black images alone."""
    annotator = wrap(randomised("vit_tiny_patch16_224", num_classes=7), "some_vit", 224)
    forward_features = annotator.network.forward_features
    annotator.network.forward_features = lambda images: (forward_features(images), None)
    with pytest.raises(AnnotateError, match="model some_vit: its features are a tuple, no single map"):
        annotator(torch.zeros(1, 3, 224, 224, dtype=torch.uint8))


@pytest.mark.parametrize("form", ["bare", "state_dict", "ema of a wrapped model"])
def test_checkpoint_files(tmp_path, form):
    network = randomised("vit_tiny_patch16_224", num_classes=7)
    state = network.state_dict()
    wrapped = {"state_dict_ema": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}
    torch.save({"bare": state, "state_dict": {"state_dict": state}}.get(form, wrapped), tmp_path / "weights.pth")
    loaded = build_annotator("vit_tiny_patch16_224", checkpoint=tmp_path / "weights.pth")
    assert loaded.num_classes == 7 and loaded.grid == (14, 14) and loaded.preprocessing.img_size == 224
    for key, value in network.state_dict().items():
        torch.testing.assert_close(loaded.network.state_dict()[key], value, rtol=0, atol=0)
    assert build_annotator("vit_tiny_patch16_224", checkpoint=tmp_path / "weights.pth", img_size=96).grid == (
        6,
        6,
    )  # pos_embed resized
    with pytest.raises(AnnotateError, match="weights.pth does not fit model vit_tiny_patch16_224 with 8 classes"):
        build_annotator("vit_tiny_patch16_224", checkpoint=tmp_path / "weights.pth", num_classes=8)
    with pytest.raises(AnnotateError, match="weights.pth does not fit model resnet18"):
        build_annotator("resnet18", checkpoint=tmp_path / "weights.pth")


def test_checkpoint_of_lvvit_keeps_its_heads(tmp_path):
    network = randomised("lvvit_t", img_size=64, num_classes=7)
    torch.save({"state_dict": network.state_dict()}, tmp_path / "weights.pth.tar")
    loaded = build_annotator("lvvit_t", checkpoint=tmp_path / "weights.pth.tar", img_size=96)
    assert loaded.num_classes == 7 and loaded.grid == (6, 6)
    torch.testing.assert_close(loaded.network.aux_head.weight, network.aux_head.weight, rtol=0, atol=0)


def test_checkpoint_means_a_runs_folder_a_checkpoints_or_a_file(tmp_path):
    network = randomised("lvvit_t", img_size=64, num_classes=7)
    optimizer = torch.optim.SGD(network.parameters())
    with pytest.raises(AnnotateError, match="run does not exist"):
        build_annotator("lvvit_t", checkpoint=tmp_path / "run", img_size=64)
    state = checkpoint.snapshot(model=network, ema=network, optimizer=optimizer, meta={"global_step": 3})
    saved = checkpoint.save(tmp_path / "run" / "checkpoints", state)
    for path in (tmp_path / "run", saved, saved / "ema.safetensors"):
        loaded = build_annotator("lvvit_t", checkpoint=path, img_size=64)
        torch.testing.assert_close(loaded.network.aux_head.weight, network.aux_head.weight, rtol=0, atol=0)


def test_weights_that_cannot_be_had(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("nest_tiny", "resnet18"):  # has none; is not in the (empty) cache
        with pytest.raises(AnnotateError, match="cannot be had.*--checkpoint FILE.*efficientnet-lite0"):
            build_annotator(name)
    with pytest.raises(AnnotateError, match="'resnet_18'.*near it: .*resnet18"):
        build_annotator("resnet_18")


def test_probe_recovers_classes_with_calibrated_logits():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 20, generator=generator)
    labels = torch.arange(300) % 3
    features = 5 + 100 * (centres[labels] + 1.5 * torch.randn(300, 20, generator=generator))
    features[:, 7] = 42  # a constant feature must do nothing, however loud it gets elsewhere
    probe = linear_probe.fit(features, labels, 3)
    fresh_labels = torch.arange(3000) % 3
    fresh = 5 + 100 * (centres[fresh_labels] + 1.5 * torch.randn(3000, 20, generator=generator))
    logits = fresh @ probe.weight.T + probe.bias
    accuracy = (logits.argmax(1) == fresh_labels).float().mean().item()
    optimal = (-torch.cdist(fresh, 5 + 100 * centres)).argmax(1).eq(fresh_labels).float().mean().item()
    assert accuracy > optimal - 0.04 and abs(100 * accuracy - probe.cv_accuracy) < 5
    assert abs(logits.softmax(1).amax(1).mean().item() - accuracy) < 0.05  # as sure as it is right
    assert probe.weight[:, 7].abs().max() * 1000 < 0.1
    again = linear_probe.fit(features, labels, 3)
    assert torch.equal(again.weight, probe.weight) and again.report() == probe.report()
    with pytest.raises(ValueError, match="at least 2 classes"):
        linear_probe.fit(features[:5], labels[:5], 3)


def test_fit_head_on_the_photos(tmp_path, photos):
    manifest = annotate(
        AnnotateConfig(
            photos / "train",
            tmp_path / "maps",
            "efficientnet-lite0",
            img_size=96,
            fit_head=True,
            eval_images=photos / "val",
            workers=1,
            device="cpu",
        )
    )
    report = manifest["probe_report"]
    assert report["eval_top1"] > 75 and report["cv_top1"] > 75  # majority class: 28 %
    assert manifest["pooled_top1"] == pytest.approx(report["train_top1"]) and manifest["complete"]
    assert manifest["class_names"] == ["animal", "fish", "monument", "tool"]
    assert sum(manifest["class_counts"]) == manifest["num_samples"] == 87
    store = LabelMapStore(tmp_path / "maps")
    assert store.complete and store.spec == MapSpec(4, 3, 3, 4)
    centre_hits = []
    for sample_id in store.ids:
        classes, scores = unpack(store.record(sample_id), store.spec)
        best = np.take_along_axis(classes, scores.argmax(0)[None], 0)[0]
        centre_hits.append(store.class_names[best[1, 1]] == sample_id.split("/")[0])
    assert np.mean(centre_hits) > 0.8
    assert not list((tmp_path / "maps").glob("features-*")) and (tmp_path / "maps" / "head.safetensors").exists()


def test_cells_lie_where_the_things_are(tmp_path, photos, lite0):
    """Two photos side by side, and one above the other: each photo's class leads in its own half."""
    files = [photos / "val" / name for name in ("animal", "tool")]
    halves = [Image.open(sorted(folder.glob("*.jpg"))[0]).convert("RGB").resize((300, 300)) for folder in files]
    (tmp_path / "images").mkdir()
    beside, above = Image.new("RGB", (600, 300)), Image.new("RGB", (300, 600))
    for i, half in enumerate(halves):
        beside.paste(half, (300 * i, 0))
        above.paste(half, (0, 300 * i))
    beside.save(tmp_path / "images" / "beside.png")
    above.save(tmp_path / "images" / "above.png")
    manifest = annotate(
        AnnotateConfig(
            tmp_path / "images",
            tmp_path / "maps",
            "efficientnet-lite0",
            img_size=256,
            topk=1000,
            workers=1,
            device="cpu",
        )
    )
    assert (
        manifest["class_counts"] is None
        and "pooled_top1" not in manifest
        and manifest["class_names"][281] == "n02123045"
    )
    store = LabelMapStore(tmp_path / "maps")
    assert store.ids == ["above.png", "beside.png"] and store.spec.shape == (1000, 8, 8)
    alone = build_annotator("efficientnet-lite0")
    with torch.inference_mode():
        pooled = torch.stack(
            [alone(torch.from_numpy(np.array(half.resize((224, 224)))).permute(2, 0, 1)[None])[1][0] for half in halves]
        )
    first, second = pooled.argmax(1).tolist()
    assert first != second
    for sample_id in store.ids:
        classes, scores = unpack(store.record(sample_id), store.spec)
        dense = np.zeros_like(scores)
        np.put_along_axis(dense, classes.astype(int), scores, 0)
        lead = dense[first] - dense[second]  # [H, W]
        lead = lead if sample_id == "beside.png" else lead.T  # now the first photo is on the left
        assert lead[:, :3].mean() > 1 and lead[:, -3:].mean() < -1


PARTS_OF_8 = "import tl_fast.labelmaps.store as m; m.PART_SIZE = 8; import tl_fast.annotate as a; a.main()"


def content(folder: Path) -> dict[str, bytes]:
    """A store's files; the manifest without its date."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return {**files, "manifest.json": json.dumps({**json.loads(files["manifest.json"]), "created": ""}).encode()}


def test_resume_and_two_ranks_give_the_same_store(tmp_path, photos, monkeypatch):
    monkeypatch.setattr(map_store, "PART_SIZE", 8)
    arguments = [str(photos / "val"), "OUT", "--eval-images", str(photos / "val")]
    arguments += "--model efficientnet-lite0 --img-size 64 --fit-head --batch-size 3 --workers 1 --device cpu".split()
    one, two = tmp_path / "one", tmp_path / "two"
    main([argument.replace("OUT", str(one)) for argument in arguments])
    whole = content(one)
    assert {"maps-00003.npy", "pooled-00003.npy", "head.safetensors"} <= set(whole) and LabelMapStore(one).complete

    (one / "maps-00001.npy").unlink()
    (one / "pooled-00002.npy").unlink()
    (one / ".maps-00001.npy.killed.tmp").write_bytes(b"half")
    kept = (one / "maps-00000.npy").stat().st_mtime_ns
    assert not LabelMapStore(one).complete
    main([argument.replace("OUT", str(one)) for argument in arguments])
    assert content(one) == whole and (one / "maps-00000.npy").stat().st_mtime_ns == kept

    (tmp_path / "parts_of_8.py").write_text(PARTS_OF_8)
    script = [str(tmp_path / "parts_of_8.py"), *(argument.replace("OUT", str(two)) for argument in arguments)]
    done = torchrun(script, 2)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("pooled top-1") == 1  # one rank talks
    assert content(two) == whole


@pytest.fixture
def few(tmp_path, photos) -> Path:
    """Six photos in two class folders named by wnids."""
    for name, wnid in (("animal", "n02123045"), ("tool", "n02808440")):
        (tmp_path / "few" / wnid).mkdir(parents=True)
        for file in sorted((photos / "val" / name).glob("*.jpg"))[:3]:
            shutil.copy(file, tmp_path / "few" / wnid)
    return tmp_path / "few"


def test_classes_keep_the_folders_logits(tmp_path, few):
    common = dict(images=few, model="efficientnet-lite0", img_size=64, workers=1, device="cpu", topk=1000)
    everything = annotate(AnnotateConfig(out=tmp_path / "all", **common))
    kept = annotate(AnnotateConfig(out=tmp_path / "kept", classes="auto", **common))
    assert (
        kept["kept_classes"] == [281, 435]
        and kept["class_names"] == ["n02123045", "n02808440"]
        and "pooled_top1" in kept
    )
    assert "pooled_top1" not in everything and kept["spec"]["k"] == 2
    dense = {}
    for name in ("all", "kept"):
        store = LabelMapStore(tmp_path / name)
        classes, scores = unpack(store.record(store.ids[-1]), store.spec)
        dense[name] = np.zeros_like(scores)
        np.put_along_axis(dense[name], classes.astype(int), scores, 0)
    np.testing.assert_allclose(
        dense["kept"][0] - dense["kept"][1], dense["all"][281] - dense["all"][435], atol=0.3
    )  # quantisation
    (tmp_path / "classes.json").write_text(json.dumps({"n02123045": "n02808440", "n02808440": 281}))
    swapped = annotate(AnnotateConfig(out=tmp_path / "swapped", classes=str(tmp_path / "classes.json"), **common))
    assert swapped["kept_classes"] == [435, 281] and swapped["pooled_top1"] == pytest.approx(100 - kept["pooled_top1"])

    for mapping, message in [
        ({"n02123045": 1}, "'n02808440'.* missing"),
        ({"n02123045": 1, "n02808440": 1000}, "1000 is no class index"),
        ({"n02123045": 1, "n02808440": "dog"}, "'dog' is not a wnid"),
        ({"n02123045": 1, "n02808440": 1}, "both mapped to class 1"),
        ([], "must map"),
    ]:
        (tmp_path / "classes.json").write_text(json.dumps(mapping))
        with pytest.raises(AnnotateError, match=message):
            annotate(AnnotateConfig(out=tmp_path / "refused", classes=str(tmp_path / "classes.json"), **common))
    assert not (tmp_path / "refused").exists()


def test_another_way_of_annotating_is_refused_until_overwritten(tmp_path, few, capsys):
    arguments = [
        str(few),
        str(tmp_path / "maps"),
        *"--model efficientnet-lite0 --workers 1 --device cpu --img-size".split(),
    ]
    assert main([*arguments, "64"])["preprocessing"]["img_size"] == 64
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "96", "--topk", "3"])
    told = capsys.readouterr().err
    assert stopped.value.code == 1
    assert all(text in told for text in ("made in another way", "--overwrite", '"img_size": 96', "spec was"))
    assert LabelMapStore(tmp_path / "maps").spec.shape == (5, 2, 2)
    main([*arguments, "96", "--topk", "3", "--overwrite"])
    assert LabelMapStore(tmp_path / "maps").spec.shape == (3, 3, 3) and LabelMapStore(tmp_path / "maps").complete
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("precious")
    with pytest.raises(AnnotateError, match="not empty"):
        annotate(AnnotateConfig(few, tmp_path / "other", "efficientnet-lite0", img_size=64, workers=1, overwrite=True))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_broken_image_ends_the_run_with_its_name(tmp_path, few, workers):
    broken = sorted(few.rglob("*.jpg"))[4]
    broken.write_bytes(broken.read_bytes()[:2000])
    with pytest.raises(AnnotateError, match=f"{broken.name}: damaged image: .*--on-error quarantine"):
        annotate(
            AnnotateConfig(few, tmp_path / "maps", "efficientnet-lite0", img_size=64, workers=workers, device="cpu")
        )
    assert not LabelMapStore(tmp_path / "maps").complete and not list((tmp_path / "maps").glob("maps-*"))


def test_any_image_mode_is_annotated(tmp_path, photos):
    """A photo in every mode gets the label map of the RGB image that this mode means."""
    with Image.open(sorted((photos / "val" / "animal").glob("*.jpg"))[0]) as opened:
        photo = opened.convert("RGB").resize((80, 60))
    grey = photo.convert("L")
    grey16 = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    see_through = Image.merge("LA", (grey, grey.point(lambda level: 255 - level)))  # alpha is dropped
    modes = {  # as stored, and the RGB image that it means
        "1": (photo.convert("1"), photo.convert("1")),
        "L": (grey, grey),
        "LA": (see_through, grey),
        "P": (photo.quantize(64), photo.quantize(64)),
        "RGBA": (Image.merge("RGBA", (*photo.split(), grey)), photo),
        "I;16": (grey16, grey),
        "CMYK": (photo.convert("CMYK"), photo),
    }
    for folder in ("stored", "meant"):
        (tmp_path / folder).mkdir()
    for mode, (stored, meant) in modes.items():
        assert stored.mode == mode
        name = f"{mode.replace(';', '')}.{'tif' if mode == 'CMYK' else 'png'}"
        stored.save(tmp_path / "stored" / name)
        meant.convert("RGB").save(tmp_path / "meant" / name)
    stores = []
    for folder in ("stored", "meant"):
        out = tmp_path / f"{folder}-maps"
        annotate(AnnotateConfig(tmp_path / folder, out, "efficientnet-lite0", img_size=64, workers=1, device="cpu"))
        stores.append(LabelMapStore(out))
    assert stores[0].ids == stores[1].ids and len(stores[0]) == len(modes)
    records = [[store.record(sample_id).tobytes() for sample_id in store.ids] for store in stores]
    assert records[0] == records[1] and len(set(records[0])) == 4  # L, LA and I;16 mean one image, RGBA and CMYK one


def test_listing(tmp_path):
    for file in ("b/deep/1.JPG", "b/0.png", "a/2.jpeg", "b/notes.txt"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    images = list_images(tmp_path)
    assert images.ids == ["a/2.jpeg", "b/0.png", "b/deep/1.JPG"]
    assert images.labels.tolist() == [0, 1, 1] and images.class_names == ["a", "b"] and images.ignored == 1
    assert list_images(tmp_path / "a").ids == ["2.jpeg"] and list_images(tmp_path / "a").labels is None
    (tmp_path / "stray.jpg").touch()
    with pytest.raises(ImageFolderError, match="stray.jpg"):
        list_images(tmp_path)
    (tmp_path / "stray.jpg").unlink()
    (tmp_path / "c").mkdir()
    for folder, message in (
        (tmp_path, "c: no images"),
        (tmp_path / "c", "no images"),
        (tmp_path / "d", "no such folder"),
    ):
        with pytest.raises(ImageFolderError, match=message):
            list_images(folder)


@pytest.mark.parametrize(
    "bad",
    [
        dict(topk=0),
        dict(batch_size=0),
        dict(workers=0),
        dict(img_size=0),
        dict(dtype="int8"),
        dict(device="tpu"),
        dict(max_rejects=3),
        dict(on_error="skip"),
        dict(exif="turn"),
        dict(timeout_minutes=0),
        dict(classes="auto", fit_head=True),
        dict(eval_images="x"),
    ],
)
def test_config_refuses(bad):
    with pytest.raises(AnnotateError, match=next(iter(bad))):
        AnnotateConfig(**{**dict(images="i", out="o", model="m"), **bad})


def test_flat_folder_has_no_classes_to_keep_or_fit(tmp_path, few):
    with pytest.raises(AnnotateError, match="flat folder"):
        annotate(AnnotateConfig(few / "n02123045", tmp_path / "maps", "efficientnet-lite0", fit_head=True))
    with pytest.raises(AnnotateError, match="has no classifier.*--fit-head"):
        torch.save(timm.create_model("resnet18", num_classes=0).state_dict(), tmp_path / "w.pth")
        annotate(
            AnnotateConfig(
                few, tmp_path / "maps", "resnet18", checkpoint=tmp_path / "w.pth", num_classes=0, img_size=64
            )
        )


def test_a_model_trained_here_annotates_with_its_token_head(tmp_path, photos):
    """With its run's size, mean, deviation and class names; and of classes the data set's are picked."""
    names = ["animal", "fish", "monument", "tool"]
    model = build_model("vit_tiny_patch16_224", img_size=96, num_classes=4, options={"depth": 2}, eval_token_weight=0.5)
    options = dict(img_size=96, model_kwargs={"depth": 2}, eval_token_weight=0.5, mean=(0.4,) * 3, std=(0.3,) * 3)
    config = TrainConfig(train_data="none", model="vit_tiny_patch16_224", num_classes=4, **options)
    meta = {"global_step": 3, "config": config.to_dict(), "class_names": names}
    optimizer = torch.optim.SGD(model.parameters())
    checkpoint.save(
        tmp_path / "teacher" / "checkpoints",
        checkpoint.snapshot(model=model, ema=model, optimizer=optimizer, meta=meta),
    )
    teacher = build_annotator(checkpoint=tmp_path / "teacher")
    assert teacher.grid == (6, 6) and teacher.name == "vit_tiny_patch16_224" and teacher.class_names == names
    assert teacher.preprocessing.img_size == 96 and teacher.preprocessing.std == (0.3,) * 3
    images = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8)
    with torch.inference_mode():
        dense, pooled = teacher(images)
        inputs = (images / 255 - 0.4) / 0.3
        tokens = model.token_logits(model.eval().forward_features(inputs))
        torch.testing.assert_close(dense.flatten(2).mT, tokens, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(pooled, model(inputs), rtol=1e-4, atol=1e-5)
    assert build_annotator(checkpoint=tmp_path / "teacher", img_size=128).grid == (8, 8)

    with pytest.raises(AnnotateError, match="is of model vit_tiny_patch16_224, not of resnet18: leave --model out"):
        build_annotator("resnet18", checkpoint=tmp_path / "teacher")
    saved = checkpoint.find(tmp_path / "teacher")
    with pytest.raises(AnnotateError, match="model.safetensors does not say which model it is: give --model"):
        build_annotator(checkpoint=saved / "model.safetensors")
    with pytest.raises(AnnotateError, match="no model is given"):
        build_annotator()

    common = dict(checkpoint=tmp_path / "teacher", workers=1, device="cpu")
    manifest = annotate(AnnotateConfig(images=photos / "train", out=tmp_path / "maps", **common))
    assert (
        manifest["model"] == "vit_tiny_patch16_224" and manifest["class_names"] == names and "pooled_top1" in manifest
    )
    renamed = tmp_path / "renamed"  # the same classes, of which two have swapped places
    renamed.mkdir()
    for name, folder in {"animal": "animal", "fish": "tool", "tool": "fish"}.items():
        (renamed / folder).symlink_to(photos / "train" / name)
    swapped = annotate(AnnotateConfig(images=renamed, out=tmp_path / "picked", classes="auto", **common))
    assert swapped["kept_classes"] == [0, 1, 3] and swapped["class_names"] == ["animal", "fish", "tool"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "whale").symlink_to(photos / "train" / "fish")
    with pytest.raises(AnnotateError, match="'whale' is no class of its run"):
        annotate(AnnotateConfig(images=tmp_path / "other", out=tmp_path / "refused", classes="auto", **common))
