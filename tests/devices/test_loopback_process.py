"""The life of a loopback device: what it leaves alone, what it leaves behind, and how it ends with its owner."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from pytest_qnn.adb.server import AdbServer, start_server
from pytest_qnn.adb.transport import AdbTransport
from pytest_qnn.errors import DeviceSpaceError
from pytest_qnn.testing import LoopbackDevice
from pytest_qnn.testing.loopback import python_environment

MakeDevice = Callable[..., LoopbackDevice]
OpenTransport = Callable[[LoopbackDevice], AdbTransport]
BOTH_WAYS = pytest.mark.parametrize("isolate", [True, False], ids=["isolated", "rewritten"])


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for what takes a moment."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def gone(process: int) -> bool:
    try:
        return psutil.Process(process).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture(params=[True, False], ids=["isolated", "rewritten"])
def device(request: pytest.FixtureRequest, make_device: MakeDevice) -> LoopbackDevice:
    return make_device("linux", isolate=request.param)


# --- its end ----------------------------------------------------------------------------------------------------------

OWNER = """
import json, subprocess, sys, time
from pytest_qnn.testing import LoopbackDevice
device = LoopbackDevice(sys.argv[1], isolate=sys.argv[2] == "True")
device.start()
print(json.dumps([device.port, device.process, device._guard.pid]), flush=True)
time.sleep(1000)
"""


@BOTH_WAYS
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_with_its_owner_and_so_does_all_that_runs_on_it(
    tmp_path: Path, adb_server: AdbServer, isolate: bool, kill: signal.Signals
) -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER, tmp_path / "device", str(isolate)], stdout=-1) as owner:
        assert owner.stdout
        port, process, guard = json.loads(owner.stdout.readline())
        adb_server.connect(f"127.0.0.1:{port}")
        transport = AdbTransport(adb_server, f"127.0.0.1:{port}")
        transport.shell(["sh", "-c", "(trap '' HUP TERM; exec setsid sleep 1000) < /dev/null > /dev/null 2>&1 & echo"])
        sleeping = [child.pid for child in psutil.Process(process).children(recursive=True)]
        assert sleeping
        owner.send_signal(kill)
        owner.wait()
    for number in (process, guard, *sleeping):
        until(lambda number=number: gone(number), "it lives on")  # type: ignore[misc]
    until(lambda: not (tmp_path / "device" / "root").exists(), "its files are still there")
    adb_server.disconnect(f"127.0.0.1:{port}")


@BOTH_WAYS
@pytest.mark.parametrize("victim", ["device", "guard"])
def test_a_device_that_is_killed_is_noticed_and_leaves_nothing(
    tmp_path: Path, adb_server: AdbServer, isolate: bool, victim: str
) -> None:
    device = LoopbackDevice(tmp_path / "device", isolate=isolate)
    device.start()
    device.connect(adb_server)
    transport = AdbTransport(adb_server, device.address)
    transport.shell(["sh", "-c", "setsid sleep 1000 < /dev/null > /dev/null 2>&1 & echo"])
    sleeping = [child.pid for child in psutil.Process(device.process).children(recursive=True)]
    assert sleeping
    guard = psutil.Process(device.process).ppid()
    os.kill(device.process if victim == "device" else guard, signal.SIGKILL)
    until(lambda: gone(device.process), "it lives on")
    with pytest.raises(OSError, match="died|does not answer"):
        device.requests()
    device.disconnect(adb_server)
    device.close()
    for process in sleeping:
        until(lambda process=process: gone(process), "it lives on")  # type: ignore[misc]
    assert not (tmp_path / "device" / "root").exists()


@BOTH_WAYS
def test_nothing_is_left_of_it(tmp_path: Path, isolate: bool) -> None:
    with LoopbackDevice(tmp_path / "device", isolate=isolate) as device:
        process = device.process
    assert gone(process)
    assert list((tmp_path / "device").iterdir()) == []
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
    device.close()  # harmless


def test_it_may_begin_again(tmp_path: Path, adb_server: AdbServer) -> None:
    device = LoopbackDevice(tmp_path / "device")
    for _ in range(2):
        with device:
            device.connect(adb_server)
            device.path("/data/local/tmp/kept").write_text("not")
            device.disconnect(adb_server)
        assert not device.folder.joinpath("root").exists()


def test_one_that_never_started_takes_no_other_from_its_server(
    device: LoopbackDevice, adb_server: AdbServer, open_transport: OpenTransport, tmp_path: Path
) -> None:
    LoopbackDevice(tmp_path / "other").disconnect(adb_server)
    assert open_transport(device).shell(["echo", "there"]).text == "there"


# --- what it can reach ------------------------------------------------------------------------------------------------


def test_a_device_can_not_harm_its_host(make_device: MakeDevice, open_transport: OpenTransport, tmp_path: Path) -> None:
    device = make_device("linux")
    if not device.isolated:
        pytest.skip(device.isolation) if os.environ.get("CI") is None else None
        return
    transport = open_transport(device)
    places = [sys.prefix, sys.base_prefix, "/usr/lib", str(Path(__file__).parents[2] / "pytest_qnn")]
    for place in places:
        done = transport.shell(["touch", f"{place}/written-by-a-device"])
        assert done.code != 0, f"it can write into {place}"
        assert not Path(place, "written-by-a-device").exists()
    assert transport.shell(["ls", str(tmp_path)]).code != 0, "it sees this host's files"
    assert transport.shell(["kill", "-0", str(os.getpid())]).code != 0, "it sees this host's processes"


def test_removing_a_device_s_files_stops_at_mounts(tmp_path: Path) -> None:
    """Its root folder has this host's folders mounted in it: whoever removes it must not be where they are seen."""
    with LoopbackDevice(tmp_path / "device") as device:
        guard = psutil.Process(device.process).ppid()
        assert str(device.folder) not in Path(f"/proc/{guard}/mountinfo").read_text()
        if device.isolated:
            assert str(device.folder) not in Path("/proc/self/mountinfo").read_text()
            assert "/usr" in Path(f"/proc/{device.process}/mountinfo").read_text()


# --- what it is -------------------------------------------------------------------------------------------------------


def test_programs_see_the_paths_of_a_device(device: LoopbackDevice, open_transport: OpenTransport) -> None:
    transport = open_transport(device)
    done = transport.shell(["cat", "/sys/devices/soc0/soc_id", "/etc/os-release", "/run/pytest-qnn-stand-in"])
    assert done.stdout.startswith(b"557\n")
    assert b"loopback board" in done.stdout
    assert b'"stand_in": "loopback device' in done.stdout
    transport.push({"/var/tmp/a file": b"content"}, timeout=10)
    assert transport.shell(["cat", "/var/tmp/a file"]).stdout == b"content"
    assert transport.shell(["sh", "-c", "cd /var/tmp; cat 'a file'"]).stdout == b"content"
    assert transport.shell(["sh", "-c", "cat $FILE"], env={"FILE": "'/var/tmp/a file'"}).code != 0
    assert transport.shell(["sh", "-c", 'cat "$FILE"'], env={"FILE": "/var/tmp/a file"}).stdout == b"content"
    assert device.path("/var/tmp/a file").read_bytes() == b"content"


def test_a_board_has_python_with_onnxruntime_and_without_us(
    device: LoopbackDevice, open_transport: OpenTransport
) -> None:
    transport = open_transport(device)
    script = "import numpy, onnxruntime, onnxruntime_qnn; print(onnxruntime.__version__)"
    done = transport.shell(["python3", "-c", script], timeout=60)
    assert (done.code, done.error) == (0, "")
    assert "No module named 'pytest_qnn'" in transport.shell(["python3", "-c", "import pytest_qnn"]).error
    assert transport.shell(["uname", "-m"]).text == "aarch64"
    assert transport.shell(["getprop"]).code == 127


@BOTH_WAYS
def test_a_board_may_lack_packages_or_python(
    make_device: MakeDevice, open_transport: OpenTransport, isolate: bool
) -> None:
    lacking = open_transport(make_device("linux", without=["onnxruntime-qnn"], isolate=isolate))
    assert lacking.shell(["python3", "-c", "import onnxruntime"], timeout=60).code == 0
    assert "No module named" in lacking.shell(["python3", "-c", "import onnxruntime_qnn"], timeout=60).error
    bare = open_transport(make_device("linux", without=None, isolate=isolate))
    assert "No module named" in bare.shell(["python3", "-c", "import numpy"]).error
    assert open_transport(make_device("linux", python=False, isolate=isolate)).shell(["python3", "-V"]).code == 127


def test_a_phone_has_getprop_logs_and_a_battery_and_no_python(
    android: LoopbackDevice, open_transport: OpenTransport
) -> None:
    transport = open_transport(android)
    assert transport.shell(["getprop", "ro.soc.model"]).text == "SM8650"
    assert transport.shell(["getprop", "ro.not.there"]).text == ""
    assert "[ro.board.platform]: [pineapple]" in transport.shell(["getprop"]).text
    assert transport.shell(["python3", "-V"]).code == 127
    for number in range(3):
        android.log(f"line {number}")
    assert transport.shell(["logcat", "-d", "-v", "threadtime", "-t", "2"]).text == "line 1\nline 2"
    assert "level: 87" in transport.shell(["dumpsys", "battery"]).text
    assert transport.shell(["cat", "/sys/class/power_supply/battery/voltage_now"]).text == "4100000"


def test_heat_and_clocks_are_what_a_test_says(device: LoopbackDevice, open_transport: OpenTransport) -> None:
    transport = open_transport(device)
    device.set_temperature(91.5, "nsp")
    device.set_cooling(3, "cdsp")
    device.set_clocks(0.5)
    device.write("/sys/class/kgsl/kgsl-3d0/gpuclk", "1")
    script = "for z in /sys/class/thermal/thermal_zone*; do echo $(cat $z/type $z/temp); done"
    zones = dict(line.split() for line in transport.shell(["sh", "-c", script]).text.splitlines())
    assert zones["nsphvx-0"] == zones["nsphmx-0"] == "91500"
    assert zones["cpu-0-0-0"] == "41000"
    paths = ["/sys/class/thermal/cooling_device2/cur_state", "/sys/class/kgsl/kgsl-3d0/gpuclk"]
    paths += ["/sys/devices/system/cpu/cpu7/cpufreq/scaling_cur_freq"]
    assert transport.shell(["cat", *paths]).text.split() == ["3", "1", "1132800"]


def test_a_small_device_is_full_when_it_is(make_device: MakeDevice, open_transport: OpenTransport) -> None:
    device = make_device("android", space=8 << 20)
    if not device.isolated:
        device.faults(push_no_space=8 << 20)
    transport = open_transport(device)
    with pytest.raises(DeviceSpaceError):
        transport.push({"/data/local/tmp/large": bytes(9 << 20)}, timeout=20)
    transport.push({"/data/local/tmp/small": bytes(1 << 20)}, timeout=20)
    assert device.path("/data/local/tmp/small").stat().st_size == 1 << 20
    if device.isolated:
        done = transport.shell(["dd", "if=/dev/zero", "of=/data/local/tmp/more", "bs=65536", "count=200"])
        assert done.code != 0
        assert "No space left on device" in done.error
        assert transport.shell(["sh", "-c", "df -k /data/local/tmp | tail -n 1"]).text.split()[1] == str(8 << 10)


def test_folders_of_the_host_below_tmp_do_not_fill_a_small_device(
    make_device: MakeDevice, open_transport: OpenTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkout, or a virtual environment, may lie in /tmp."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder, "large").write_bytes(bytes(9 << 20))
        shown = [*python_environment.shown(), folder]
        monkeypatch.setattr(python_environment, "shown", lambda: shown)
        device = make_device("android", space=8 << 20)
        done = open_transport(device).shell(["dd", "if=/dev/zero", "of=/data/local/tmp/x", "bs=65536", "count=100"])
        assert done.code == 0, done.error


def test_eight_devices_at_once_keep_their_bytes_apart(make_device: MakeDevice, open_transport: OpenTransport) -> None:
    devices = [make_device("android", name=f"device {number}") for number in range(8)]
    transports = [open_transport(device) for device in devices]

    def work(number: int) -> bytes:
        transport = transports[number]
        for turn in range(3):
            transport.push({f"/data/local/tmp/{turn}": bytes([number + 1]) * (1 << 20)}, timeout=60)
        return transport.shell(
            ["sh", "-c", "cat /data/local/tmp/? | tail -c 4; getprop ro.serialno"], timeout=60
        ).stdout

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(work, range(8)))
    assert answers == [bytes([number + 1]) * 4 + f"device {number}\n".encode() for number in range(8)]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"flavor": "windows"}, "expected 'android' or 'linux'"), ({"soc": "SM9999"}, "SM9999")],
)
def test_nonsense_is_refused(tmp_path: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoopbackDevice(tmp_path, **options)  # type: ignore[arg-type]


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "pytest_qnn.testing.loopback", "--flavor", "android", "--count", "2"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=environment) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_served_devices_can_be_used_and_end_with_the_command(
    served: subprocess.Popen[str], tmp_path: Path, how: signal.Signals
) -> None:
    assert served.stdout
    assert served.stderr
    lines = []
    while not lines or lines[-1].count("--qnn-device=") + (len(lines) > 1 and "--qnn-device=" in lines[-2]) < 2:
        lines.append(served.stdout.readline())
        assert lines[-1], served.stderr.read()
    serial, server = lines[-1].strip().removeprefix("--qnn-device=adb://").split("@")
    host, port = server.split(":")
    transport = AdbTransport(AdbServer(host, int(port)), serial)
    assert transport.shell(["getprop", "ro.product.model"]).text == "pytest-qnn loopback"
    children = psutil.Process(served.pid).children(recursive=True)
    assert len(children) >= 6
    served.send_signal(how)
    served.wait(30)
    for child in children:
        until(lambda child=child: gone(child.pid), f"{child} lives on")  # type: ignore[misc]
    until(lambda: list(tmp_path.iterdir()) == [], "files are left")


# Popen returns late, as on a busy machine: the command runs before this process knows it.
LATE = """
import subprocess, sys, time
class Late(subprocess.Popen):
    def __init__(self, command, *arguments, **options):
        super().__init__(command, *arguments, **options)
        if command[0] == "sh": time.sleep(2)
subprocess.Popen = Late
from pytest_qnn.testing.loopback.__main__ import main
sys.exit(main())
"""


@pytest.mark.parametrize("start", [["-m", "pytest_qnn.testing.loopback"], ["-c", LATE]], ids=["now", "late"])
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_command_tidies_up_with_its_devices(tmp_path: Path, start: list[str], how: signal.Signals) -> None:
    script = 'trap "sleep 0.5; echo tidied; exit 3" INT TERM; echo ready; while :; do sleep 0.05; done'
    command = [sys.executable, *start, "--", "sh", "-c", script]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=-1, text=True, env=environment, start_new_session=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        if how is signal.SIGINT:
            os.killpg(process.pid, how)  # as a terminal does
        else:
            process.send_signal(how)
        try:
            assert process.communicate(timeout=30)[0] == "tidied\n"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        assert process.returncode == 3
    until(lambda: list(tmp_path.iterdir()) == [], "files are left")


def test_its_phones_can_run_models_without_an_option(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest_qnn.testing.loopback", "--flavor", "android", "--"]
    look = [sys.executable, "-m", "pytest_qnn.cli", "devices", "--json"]
    environment = {name: value for name, value in os.environ.items() if name != "QNN_SDK_ROOT"}
    done = subprocess.run(command + look, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60)
    (device,) = json.loads(done.stdout)["devices"]
    assert device["runtime"].endswith("on the device")
    assert device["facts"]["stand_in"]


def test_a_command_that_is_not_there_is_said(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest_qnn.testing.loopback", "nosuchcommand"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (done.returncode, done.stderr) == (127, "loopback: nosuchcommand: No such file or directory\n")


def test_a_server_that_says_no_is_an_error_with_its_words(tmp_path: Path) -> None:
    with start_server() as server, LoopbackDevice(tmp_path / "device") as device:
        device.unplug()
        with pytest.raises(OSError, match=f"adb connect {device.address}"):
            device.connect(server)
