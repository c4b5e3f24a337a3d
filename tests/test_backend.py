import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import progtuning_kernels
from progtuning_kernels import MaskedAdamW, backend, ops
from progtuning_kernels.backend import Implementation, Op, select
from progtuning_kernels.cli import cuda_toolkit, doctor, provenance
from progtuning_kernels.ops import backend_report
from progtuning_kernels.ops.contract import DTYPES

CPU = torch.device("cpu")
TENSORS = [torch.zeros(3)]


def implementation(name, reason=None):
    return Implementation(name, lambda: name, lambda tensors: reason)


@pytest.fixture
def op(monkeypatch):
    monkeypatch.delenv("PROGTUNING_BACKEND", raising=False)
    return Op(
        "example",
        (implementation("native", "it is Monday"), implementation("reference")),
    )


def test_the_first_without_a_reason_runs(op):
    assert select(op, TENSORS).name == "reference"
    everything = Op("example", tuple(map(implementation, backend.PREFERENCE)))
    assert select(everything, TENSORS).name == "native"
    assert select(everything, TENSORS, "auto").name == "native"


def test_the_reasons_are_about_the_tensors_at_hand(op):
    def reason(tensors):
        return None if tensors[0].dtype == torch.float32 else "float32 only"

    picky = Op("picky", (Implementation("native", print, reason), implementation("reference")))
    assert select(picky, TENSORS).name == "native"
    assert select(picky, [torch.zeros(3).double()]).name == "reference"


def test_a_forced_implementation_that_can_run_does(op, monkeypatch):
    everything = Op("example", tuple(map(implementation, backend.PREFERENCE)))
    assert select(everything, TENSORS, "triton").name == "triton"
    monkeypatch.setenv("PROGTUNING_BACKEND", "reference")
    assert select(everything, TENSORS).name == "reference"
    assert select(everything, TENSORS, "auto").name == "reference"
    assert select(everything, TENSORS, "triton").name == "triton"


def test_a_forced_implementation_that_cannot_run_raises_its_reason(op, monkeypatch):
    with pytest.raises(
        RuntimeError, match="example: implementation=native cannot run: it is Monday"
    ):
        select(op, TENSORS, "native")
    with pytest.raises(RuntimeError, match="example has no triton implementation"):
        select(op, TENSORS, "triton")


def test_a_preferred_implementation_that_cannot_run_is_passed_over_with_its_reason(op, monkeypatch):
    monkeypatch.setattr(backend, "passed_over", {})
    monkeypatch.setenv("PROGTUNING_BACKEND", "native")
    assert select(op, TENSORS).name == "reference"
    assert backend_report().passed_over == {"example": "it is Monday"}
    monkeypatch.setenv("PROGTUNING_BACKEND", "triton")
    assert select(op, TENSORS).name == "reference"
    assert backend_report().passed_over == {"example": "example has no triton implementation"}
    line = "example: not what PROGTUNING_BACKEND prefers: example has no triton implementation"
    assert str(backend_report()).endswith(line)


def test_clipping_goes_on_where_triton_is_preferred_and_has_no_norm(monkeypatch):
    monkeypatch.setenv("PROGTUNING_BACKEND", "triton")
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.full((3,), 10.0)
    MaskedAdamW([p], lr=0.1, max_grad_norm=1.0).step()
    assert (p < 1).all()
    assert "TRITON_INTERPRET=1" in backend_report().passed_over["masked_update"]


def test_an_unknown_implementation_is_named_with_the_choices(op, monkeypatch):
    with pytest.raises(ValueError, match="implementation=cuda: choose one of auto, native"):
        select(op, TENSORS, "cuda")
    monkeypatch.setenv("PROGTUNING_BACKEND", "gpu")
    with pytest.raises(ValueError, match="PROGTUNING_BACKEND=gpu"):
        select(op, TENSORS)


def test_nothing_can_run(op):
    hopeless = Op("hopeless", (implementation("native", "a"), implementation("reference", "b")))
    with pytest.raises(RuntimeError, match="no implementation can run: native: a; reference: b"):
        select(hopeless, TENSORS)


def test_registration_refuses_a_second_op_of_a_name_and_a_wrong_order():
    with pytest.raises(ValueError, match="registered twice"):
        backend.register(backend.OPS["masked_norm"])
    with pytest.raises(ValueError, match="not in order"):
        Op("example", (implementation("reference"), implementation("native")))


def test_the_report_has_every_row_and_a_reason_for_every_no(monkeypatch):
    monkeypatch.setattr(backend, "passed_over", {})
    report = backend_report()
    rows = {(row.op, row.device, row.implementation): row for row in report.rows}
    assert len(rows) == len(report.rows) == len(backend.OPS) * 2 * len(backend.PREFERENCE)
    assert {row.op for row in report.rows} == set(ops.__all__) - {"backend_report"}
    for row in report.rows:
        assert (row.ok and row.reason is None) or (not row.ok and row.reason)
        assert rows[row.op, "cpu", "reference"].ok
    text = str(report).splitlines()
    assert len(text) == len(rows) + 1
    for line, row in zip(text[1:], report.rows, strict=True):
        assert row.op in line and line.endswith("yes" if row.ok else row.reason)


def test_the_report_survives_an_op_whose_probe_fails(monkeypatch):
    def probe(device):
        raise RuntimeError("out of memory\nlong trace")

    broken = Op("broken", (implementation("reference"),), probe)
    monkeypatch.setitem(backend.OPS, "broken", broken)
    reasons = [r.reason for r in backend_report().rows if r.op == "broken" and r.device == "cpu"]
    assert reasons == ["out of memory"] * 3


@pytest.fixture
def no_extension(monkeypatch):
    """As if `_C` did not import."""
    monkeypatch.setitem(sys.modules, "progtuning_kernels._C", None)
    monkeypatch.delattr(progtuning_kernels, "_C", raising=False)
    backend._load_native.cache_clear()
    yield
    backend._load_native.cache_clear()


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({}, "was not built: run `pip install"),
        ({"native": False, "reason": "no C++ compiler"}, "was not built: no C++ compiler"),
        ({"native": True, "reason": ""}, "does not load: import of progtuning_kernels._C halted"),
    ],
)
def test_without_the_extension_the_reason_is_kept(no_extension, monkeypatch, record, reason):
    monkeypatch.setattr(backend, "build_record", lambda: record)
    monkeypatch.delenv("PROGTUNING_BACKEND", raising=False)
    assert backend.native_extension() is None
    assert reason in backend.native_reason(CPU)
    assert ops.masked_norm([torch.full((4,), 2.0)]).item() == 4.0
    with pytest.raises(RuntimeError, match="implementation=native cannot run: the extension"):
        ops.masked_norm(TENSORS, implementation="native")


def test_the_build_record_is_read_from_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(backend, "__file__", str(tmp_path / "backend.py"))
    assert backend.build_record() == {}
    (tmp_path / "_build.json").write_text("not json")
    assert backend.build_record() == {}
    (tmp_path / "_build.json").write_text(json.dumps({"native": False, "reason": "why"}))
    assert backend.build_record() == {"native": False, "reason": "why"}


def test_triton_needs_the_interpreter_on_the_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET=1" in backend.triton_reason(CPU)
    assert "meta" in backend.triton_reason(torch.device("meta"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(backend, "_triton_import_reason", lambda: "Triton does not load: why")
    assert backend.triton_reason(CPU) == "Triton does not load: why"


@pytest.mark.parametrize(
    ("cuda_built", "driver_error", "capability", "reason"),
    [
        (False, None, (9, 0), "the extension was built without CUDA: nvcc not found"),
        (True, "driver version is insufficient", (9, 0), "driver version is insufficient"),
        (True, None, (7, 5), "the kernels need sm_80, this GPU is sm_75"),
        (True, None, (12, 0), None),
    ],
)
def test_why_native_cannot_run_on_a_gpu(monkeypatch, cuda_built, driver_error, capability, reason):
    def cuda_device_count():
        if driver_error:
            raise RuntimeError(driver_error)
        return 1

    fake = SimpleNamespace(
        cuda_built=cuda_built,
        cuda_archs="sm_80 sm_120 compute_80",
        cuda_device_count=cuda_device_count,
    )
    monkeypatch.setattr(backend, "_load_native", lambda: (fake, None))
    monkeypatch.setattr(backend, "build_record", lambda: {"cuda_reason": "nvcc not found"})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    backend._native_cuda_reason.cache_clear()
    try:
        assert backend.native_reason(torch.device("cuda", 0)) == reason
    finally:
        backend._native_cuda_reason.cache_clear()


def test_under_rocm_native_kernels_do_not_run_and_doctor_says_what_triton_is(monkeypatch):
    gpu = SimpleNamespace(total_memory=2**37, name="MI300X", gcnArchName="gfx942", major=9, minor=4)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(backend, "triton_trials", {0: None})
    monkeypatch.setattr(backend, "_triton_import_reason", lambda: None)
    extension = SimpleNamespace(cuda_built=False, openmp=True)
    monkeypatch.setattr(backend, "_load_native", lambda: (extension, None))
    monkeypatch.setattr(doctor, "openmp_pools", lambda: [])
    monkeypatch.delenv("PROGTUNING_BACKEND", raising=False)
    backend._native_cuda_reason.cache_clear()
    try:
        device = torch.device("cuda", 0)
        assert backend.native_reason(device) == "no native kernels for AMD GPUs"
        assert backend.triton_reason(device) is None
        assert doctor._triton_in_words(device).endswith("compiled in tests, and have never run")
        assert doctor._advice(device) == []
        assert doctor._gpu(0) == "MI300X, gfx942, 128 GiB"
        assert doctor._versions()[-1] == ("ROCm of torch", "6.4")
    finally:
        backend._native_cuda_reason.cache_clear()


@pytest.mark.skipif(backend.native_extension() is None, reason="the extension was not built")
def test_dtype_codes_and_devices_without_kernels():
    assert len({backend.dtype_code(dtype) for dtype in DTYPES}) == len(DTYPES)
    with pytest.raises(KeyError):
        backend.dtype_code(torch.int64)
    assert backend.native_reason(torch.device("meta")) == "no native kernels for meta tensors"


def test_import_prints_nothing():
    code = "import progtuning_kernels.ops"  # and the package itself
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


MAPS = """\
7f00-7f10 r-xp 00000000 08:01 1 /opt/torch/lib/libgomp.so.1
7f10-7f20 r--p 00010000 08:01 1 /opt/torch/lib/libgomp.so.1
7f20-7f30 r-xp 00000000 08:01 2 /opt/my env/sklearn/libgomp-a1b2.so.1.0.0
7f30-7f40 rw-p 00000000 00:00 0
7f40-7f50 r-xp 00000000 08:01 3 /usr/lib/libm.so.6
"""


def test_doctor_tells_openmp_pools_apart():
    assert doctor.openmp_pools(MAPS) == [
        "/opt/my env/sklearn/libgomp-a1b2.so.1.0.0",
        "/opt/torch/lib/libgomp.so.1",
    ]


def test_doctor_prints_everything(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    doctor.run(everything=True)
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    for row in backend_report().rows:
        assert (row.reason or "").removeprefix(f"{row.op} ") in printed


def test_doctor_prints_without_the_extension(no_extension, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    record = {"native": False, "reason": "no compiler [cc] here"}
    monkeypatch.setattr(backend, "build_record", lambda: record)
    doctor.run(everything=True)
    for part in capsys.readouterr().out.split("Implementations"):
        assert "the extension was not built: no compiler [cc] here" in part


def _summary(capsys, monkeypatch) -> dict[str, str]:
    monkeypatch.setenv("COLUMNS", "200")
    doctor.run()
    lines = [line.split("│")[1:3] for line in capsys.readouterr().out.splitlines() if "│" in line]
    return {name.strip(): value.strip() for name, value in lines if name.strip()}


def test_doctor_begins_with_what_runs_here(capsys, monkeypatch):
    found = _summary(capsys, monkeypatch)
    assert list(found) == [
        "version",
        "device",
        "native extension",
        "Triton",
        "ops",
        "to make it faster",
    ]
    assert found["device"].startswith("cuda" if torch.cuda.is_available() else "cpu")


def test_doctor_says_what_would_be_faster(no_extension, capsys, monkeypatch):
    monkeypatch.setattr(backend, "build_record", lambda: {"native": False, "reason": "no compiler"})
    monkeypatch.setattr(doctor, "openmp_pools", lambda: [])
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.delenv("PROGTUNING_BACKEND", raising=False)
    found = _summary(capsys, monkeypatch)
    assert found["native extension"] == "the extension was not built: no compiler"
    assert "C++17 compiler, `pip install .` in a clone" in found["to make it faster"]
    monkeypatch.setattr(backend, "native_extension", lambda: SimpleNamespace(openmp=True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (
        _summary(capsys, monkeypatch)["to make it faster"] == "nothing is missing for this device"
    )
    monkeypatch.setenv("PROGTUNING_BACKEND", "reference")
    found = _summary(capsys, monkeypatch)
    assert found["to make it faster"] == "PROGTUNING_BACKEND unset: it is 'reference'"
    assert found["ops"].startswith("plain PyTorch: ")


def test_doctor_fits_a_screen_where_everything_is_missing(capsys, monkeypatch):
    gpu = SimpleNamespace(total_memory=2**37, name="NVIDIA H100 80GB HBM3", major=9, minor=0)
    extension = SimpleNamespace(cuda_built=False, openmp=False)
    reason = "/usr/local/cuda/bin/nvcc is 11.8, older than 12.1"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(backend, "_load_native", lambda: (extension, None))
    monkeypatch.setattr(backend, "native_extension", lambda: extension)
    monkeypatch.setattr(backend, "build_record", lambda: {"cuda_reason": reason})
    monkeypatch.setattr(backend, "triton_trials", {0: "install a C compiler (gcc)"})
    monkeypatch.setattr(cuda_toolkit, "_places", lambda: {})
    monkeypatch.setattr(doctor, "openmp_pools", lambda: ["one", "two"])
    monkeypatch.setenv("PROGTUNING_BACKEND", "reference")
    monkeypatch.setenv("COLUMNS", "80")
    backend._native_cuda_reason.cache_clear()
    try:
        doctor.run()
    finally:
        backend._native_cuda_reason.cache_clear()
    lines = capsys.readouterr().out.splitlines()
    text = " ".join(line.split("│")[2].strip() for line in lines if line.startswith("│"))
    missing = ("OpenMP: native", "nvidia-cuda-nvcc==13.0.*", "Triton: ", "PROGTUNING_BACKEND unset")
    assert all(part in text for part in (*missing, "OMP_WAIT_POLICY=passive"))
    assert len(lines) < 24 and max(map(len, lines)) <= 80  # the prompt takes a line


def test_one_thread_is_no_threads(monkeypatch):
    for threads, words in ((1, "1 thread"), (2, "2 threads")):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert provenance.cpu_in_words().endswith(f", {words}")
