"""Test the command ``efft`` on scikit-learn's digits and a small random ViT.

The tests cover training, evaluation, merging, export and inspection, killed and distributed runs, the commands in the
documentation, error messages, and the packages that light commands import.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import efft
from efft_lab.cli import main
from efft_lab.train import TrainConfig, read_metrics
from efft_lab.train.build import load_trained

for package in ("accelerate", "timm", "tyro", "sklearn"):
    pytest.importorskip(package, reason="needs the dev extra")

ROOT = Path(efft.__file__).parents[1]
SMALL = [
    *("--data", "digits", "--model", "test_vit", "--no-pretrained", "--image-size", "32"),
    *("--epochs", "2", "--schedule-per", "update", "--lr", "5e-3", "--rank", "4", "--scale", "10", "--log-every", "1"),
]


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFT_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run of the method efft on digits. The tests of this module share the run."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    assert main(["train", *SMALL, "--out", str(out)]) == 0
    return out


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run a command that must end with exit code 2 and without a traceback, and return what it wrote to stderr."""
    capsys.readouterr()
    try:
        code: Any = main(words)
    except SystemExit as end:  # raised by tyro
        code = end.code
    assert code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def test_train_writes_a_run(trained: Path) -> None:
    result = json.loads((trained / "result.json").read_text())
    assert result["config"]["efft"]["rank"] == 4
    assert result["factor_parameters"] == (2 * 64 * 4 + 6 * 4 * 16) + (64 * 4 + 4 * 192 + 6 * 2 * 16)
    assert result["trainable_parameters"] == result["factor_parameters"] + 64 * 10 + 10
    assert result["saved_bytes"] < 30_000
    assert TrainConfig.load(trained / "config.json").lr == 5e-3


def test_eval_needs_the_test_split_named(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads((trained / "result.json").read_text())
    assert main(["eval", str(trained)]) == 0
    assert f"val accuracy {result['val_accuracy']:.2%} (" in capsys.readouterr().out
    assert main(["eval", str(trained / "adapter"), "--split", "test", "--per-class"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"test accuracy {result['test_accuracy']:.2%} (")
    assert len(lines) == 11
    right, images = (sum(int(line.split()[column]) for line in lines[1:]) for column in (1, 3))
    assert right / images == pytest.approx(result["test_accuracy"])


def test_merge_writes_a_plain_model(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import timm

    out = tmp_path / "merged.safetensors"
    assert main(["merge", str(trained), "--out", str(out)]) == 0
    assert "merged 24 layers" in capsys.readouterr().out
    plain = timm.create_model("test_vit", img_size=32, num_classes=10).eval()
    plain.load_state_dict(load_file(out))  # strict loading requires the names and shapes of the plain architecture
    adapted, _ = load_trained(trained)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected, base = adapted(images), None
        with efft.disabled(adapted):
            base = adapted(images)
        torch.testing.assert_close(plain(images), expected, rtol=1e-4, atol=1e-5)
    assert (expected - base).abs().max() > 1e-3  # the merged update has an effect


def test_export_writes_a_lora_checkpoint(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(trained)]) == 0
    folder = trained / "lora"
    assert f"wrote {folder} (0.1 MB)" in capsys.readouterr().out
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], len(config["target_modules"])) == ("test_vit", 4, 24)


def test_inspect_an_adapter_of_another_method(
    tiny_vit: Callable[..., nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    efft.save_adapter(efft.apply(tiny_vit(), efft.methods.LoRAConfig(rank=4, scale=0.5)), tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    expected = "adapter for VisionTransformer: lora, rank 4, scale 0.5, targets all; 8 layers, head head\n"
    assert capsys.readouterr().out.startswith(expected)


def test_inspect_saved_adapter(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(trained)]) == 0
    out = capsys.readouterr().out
    assert "efft2, rank 4, scale 10.0, targets all, cores per_layer; 24 layers, head head" in out
    assert "efft.mhsa.C         384  [6, 4, 4, 4]" in out


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (
            ["vit_base_patch16_224"],
            ["all factors        245,760     0.286 %", "backbone        85,798,656   100.000 %"],
        ),
        (["vit_base_patch16_224", "--variant", "efft1"], ["all factors        159,744     0.186 %"]),
        (["vit_large_patch16_224", "--rank", "24"], ["all factors        254,976     0.084 %"]),
        (["swin_base_patch4_window7_224", "--rank", "8"], ["stage4_ffn          41,216"]),
        ([], ["dinov2_vits14_saliency, efft2", "all factors        159,744"]),
    ],
)
def test_inspect_model(words: list[str], lines: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", *words]) == 0
    out = capsys.readouterr().out
    for line in lines:
        assert line in out


def test_flags_override_the_configuration_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "config.json", tmp_path / "run"
    assert main(["train", *SMALL, "--epochs", "1", "--out", str(out)]) == 0
    config = TrainConfig.load(out / "config.json")
    config.save(file)
    other = tmp_path / "other"
    words = ["train", "--config", str(file), "--method", "linear", "--dropout", "0.2", "--out", str(other)]
    assert main(words) == 0
    saved = TrainConfig.load(other / "config.json")
    assert (saved.method, saved.efft.dropout) == ("linear", 0.2)
    assert (saved.lr, saved.efft.rank, saved.epochs) == (config.lr, config.efft.rank, 1)
    assert "head.safetensors of" in capsys.readouterr().out
    assert main(["eval", str(other)]) == 0
    accuracy = json.loads((other / "result.json").read_text())["val_accuracy"]
    assert f"val accuracy {accuracy:.2%}" in capsys.readouterr().out
    assert "which trains no factors: there is nothing to merge" in fails(capsys, "merge", str(other))
    assert "which trains no factors: there is nothing to export" in fails(capsys, "export", str(other))


def test_full_run_is_restored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", *SMALL, "--method", "full", "--epochs", "1", "--lr", "1e-3", "--out", str(tmp_path / "run")]
    assert main(words) == 0
    accuracy = json.loads((tmp_path / "run" / "result.json").read_text())["test_accuracy"]
    assert main(["eval", str(tmp_path / "run"), "--split", "test"]) == 0
    assert f"test accuracy {accuracy:.2%}" in capsys.readouterr().out


def test_base_from_a_file_that_moved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import timm

    out, first, second = tmp_path / "run", tmp_path / "base.pth", tmp_path / "moved.pth"
    torch.save(timm.create_model("test_vit", img_size=32).state_dict(), first)
    assert main(["train", *SMALL, "--epochs", "1", "--checkpoint", str(first), "--out", str(out)]) == 0
    first.rename(second)
    assert f"checkpoint {first} does not exist" in fails(capsys, "eval", str(out))
    assert main(["eval", str(out), "--checkpoint", str(second), "--split", "test"]) == 0
    accuracy = json.loads((out / "result.json").read_text())["test_accuracy"]
    assert f"test accuracy {accuracy:.2%}" in capsys.readouterr().out


def without_times(folder: Path) -> list[dict[str, Any]]:
    records = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in ("seconds", "images_per_second")} for record in records]


@pytest.mark.slow
def test_killed_process_resumes_to_the_same_bits(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = ["train", *SMALL, "--checkpoint-every", "2", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT.parent)]), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "efft", *words], env=environment, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 120
        while not (out / "metrics.jsonl").exists() or len(read_metrics(out / "metrics.jsonl")) < 15:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert (out / "checkpoint.pt").exists()
    assert "holds an unfinished run" in fails(capsys, *words)
    assert "cannot resume with another configuration: lr was 0.005, is 0.1" in fails(
        capsys, *words, "--resume", "--lr", "0.1"
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the number of threads determines the order of sums
    try:
        assert main([*words, "--resume"]) == 0
        assert main(["train", *SMALL, "--out", str(tmp_path / "unbroken")]) == 0
    finally:
        torch.set_num_threads(threads)
    assert "continuing after update" in capsys.readouterr().out
    adapters = [load_file(f / "adapter" / "adapter_model.safetensors") for f in (out, tmp_path / "unbroken")]
    assert adapters[0].keys() == adapters[1].keys()
    for name, tensor in adapters[0].items():
        assert torch.equal(tensor, adapters[1][name]), name
    assert without_times(out) == without_times(tmp_path / "unbroken")


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    """Two processes share each batch. Without random masks, their losses equal those of one process up to rounding."""
    words = ["train", *SMALL, "--epochs", "1", "--dropout", "0", "--drop-path", "0", "--out"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "efft"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT.parent)]),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "1",
    }
    command = [*launch, *words, str(tmp_path / "two")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test accuracy") == 1
    assert main([*words, str(tmp_path / "one")]) == 0
    one, two = (without_times(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two)
    for ours, theirs in zip(one, two, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    assert json.loads((tmp_path / "two" / "result.json").read_text())["processes"] == 2


DOCUMENTED = sorted(
    {
        line.split("#")[0].strip()
        for page in (ROOT.parent / "README.md", *sorted((ROOT.parent / "docs").glob("*.md")))
        for block in re.findall(r"```console\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
        for line in block.splitlines()
        if re.match(r"efft |accelerate launch .*-m efft ", line)
    }
)


@pytest.mark.parametrize("line", DOCUMENTED)
def test_documented_commands_are_understood(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each command must parse and reach the function that does the work. The test replaces this function."""

    def reached(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the work begins")

    launcher, efft_words = line.split("efft ", 1)
    if launcher:
        from accelerate.commands.launch import launch_command_parser

        launch_command_parser().parse_args([*shlex.split(launcher)[2:], "efft"])
    (tmp_path / "my_suite.json").write_text((ROOT / "efft_lab/compare/suites/local.json").read_text())
    monkeypatch.chdir(tmp_path)
    for function in (
        *(
            "efft_lab.train.run",
            "efft_lab.train.build.load_trained",
            "efft_lab.data.list_table",
            "efft_lab.data.fetch",
            "efft_kernels.env.report",
        ),
        *("efft_lab.compare.runner.compare", "efft_lab.compare.report.write", "efft_lab.cli.inspect.model_table"),
    ):
        monkeypatch.setattr(function, reached)
    assert fails(capsys, *shlex.split(efft_words)) == "efft: error: the work begins\n"


def test_documented_commands_are_found() -> None:
    assert {line.split()[1] for line in DOCUMENTED} >= {"train", "eval", "compare", "merge", "export", "inspect", "env"}


def test_options_by_their_names_in_configuration_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """``--targets`` accepts a layer name or a group of layers, here mhsa."""
    seen: list[TrainConfig] = []

    def note(config: TrainConfig, *_: Any, **__: Any) -> Any:
        seen.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr("efft_lab.train.run", note)
    assert (
        main(["train", "--efft.scale", "auto", "--efft.rank=4", "--targets", "attn.qkv", "--exclude", "mlp.fc1"]) == 130
    )
    assert (seen[0].efft.scale, seen[0].efft.rank) == ("auto", 4)
    assert (seen[0].efft.targets, seen[0].efft.exclude) == (["attn.qkv"], ["mlp.fc1"])
    assert main(["train", "--targets", "mhsa"]) == 130
    assert seen[1].efft.targets == "mhsa"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (["zzzz"], "unknown command 'zzzz'; known: train, eval, compare, merge, export, inspect, data, bench, env"),
        (["env", "now"], "env takes no arguments, got 'now'"),
        (["train", "--config", "nope.json"], "there is no configuration file nope.json"),
        (["train", "--lr", "-1"], "lr must be at least 0, got -1.0"),
        (["train", "--rnk", "3"], "Unrecognized options: --rnk"),
        (["train", "--data", "digitz", *SMALL[2:]], "'digitz' is not a known task"),
        (["train", *SMALL, "--targets", "attn.qvk", "nothing"], "matches no linear layer"),
        (["eval", "nowhere"], "'nowhere' contains no result.json of a run and no adapter_config.json of an adapter"),
        (["inspect", "vit_base_patch16_223"], "did you mean 'vit_base_patch16_224'"),
        (["inspect", "--rank", "0"], "rank must be"),
        (["data", "fetch", "elpv"], "--allow-non-commercial"),
    ],
)
def test_mistakes(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, *words)


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFT_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        main(["eval", "nowhere"])


def test_interrupt_points_to_resume(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("efft_lab.train.run", interrupt)
    assert main(["train", *SMALL]) == 130
    assert "interrupted; the same command with --resume continues" in capsys.readouterr().err


def test_usage_and_lists(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert "usage: efft COMMAND" in capsys.readouterr().out
    assert main(["data", "list"]) == 0
    assert "mnist5k" in capsys.readouterr().out
    assert main(["data", "fetch", "digits"]) == 0
    assert "digits: ready" in capsys.readouterr().out


def test_a_reader_may_stop_early() -> None:
    """`efft data list | head -1`, for example, must not end with a traceback."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT.parent)])}
    command = [sys.executable, "-c", "import sys; from efft_lab.cli import main; sys.exit(main(['data', 'list']))"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as done:
        done.stdout.close()
        assert (done.stderr.read(), done.wait()) == ("", 141)


def test_light_commands_load_no_heavy_package() -> None:
    program = (
        "import sys\nfrom efft_lab.cli import main\n"
        "assert main(['env']) == 0 and main(['--help']) == 0\n"
        "import efft_lab.backbones, efft_lab.train\n"
        "loaded = {'timm', 'torchvision', 'accelerate', 'tyro', 'matplotlib', 'onnx'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT.parent)])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch " in done.stdout


def test_training_by_another_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "lora.json", tmp_path / "run"
    file.write_text('{"method": "lora", "adapter": {"rank": 2, "targets": ["attn.qkv"]}}')
    words = SMALL[: SMALL.index("--rank")]  # without --rank and --scale, which only the method efft has
    assert main(["train", "--config", str(file), *words, "--epochs", "1", "--out", str(out)]) == 0
    assert "Unrecognized options: --rnk" in fails(capsys, "train", "--config", str(file), "--rnk", "3")
    model, config = load_trained(out)
    assert config.adapter == {"rank": 2, "targets": ["attn.qkv"]}
    assert efft.count_parameters(model).groups == {"qkv": len(model.efft.layers) * 2 * (64 + 3 * 64)}
    assert main(["eval", str(out)]) == 0
