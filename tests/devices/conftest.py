"""Devices for tests: loopback devices, reached through a real ADB server of the tests' own."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pytest_qnn.adb.server import AdbServer, start_server
from pytest_qnn.adb.transport import AdbTransport
from pytest_qnn.testing import LoopbackDevice
from tests.conftest import SKIPS_ALLOWED

DEBIAN_ADB = Path("/usr/bin/adb")


def bundled_adb() -> Path:
    """The adb that comes with adbutils: of this decade, on every Linux x86-64 that the tests run on."""
    import adbutils

    return Path(adbutils.__file__).parent / "binaries" / "adb"


@pytest.fixture(scope="session")
def adb_binary() -> Path:
    """The adb program that tests use that don't care which."""
    return bundled_adb()


@pytest.fixture(scope="session", params=["adb-bundled", "adb-debian"])
def each_adb(request: pytest.FixtureRequest) -> Path:
    """The test runs with each: adbutils' own (36) and Debian's (29)."""
    if request.param == "adb-bundled":
        return bundled_adb()
    if not DEBIAN_ADB.exists():
        if not SKIPS_ALLOWED:
            pytest.fail("CI must have Debian's adb: apt-get install adb")
        pytest.skip("Debian's adb is not installed (apt-get install adb)")
    return DEBIAN_ADB


def needs_own_root(device: LoopbackDevice) -> None:
    """Skip a test of what a device without a root folder of its own doesn't model: system files, and paths that programs tell."""
    if not device.isolated:
        if not SKIPS_ALLOWED:
            pytest.fail(f"CI must allow Linux namespaces: {device.isolation}")
        pytest.skip(f"the loopback device has no root folder of its own: {device.isolation}")


@pytest.fixture(scope="session")
def adb_server(adb_binary: Path) -> Iterator[AdbServer]:
    """A private server, one for all tests."""
    with start_server(adb=adb_binary) as server:
        yield server


@pytest.fixture
def make_device(tmp_path: Path, adb_server: AdbServer) -> Iterator[Callable[..., LoopbackDevice]]:
    """Make connected devices: ``make_device("linux", soc="QCS6490", ...)``."""
    devices: list[LoopbackDevice] = []

    def make(flavor: str = "android", **options: object) -> LoopbackDevice:
        device = LoopbackDevice(tmp_path / f"device{len(devices)}", flavor=flavor, **options)  # type: ignore[arg-type]
        devices.append(device)
        device.start()
        device.connect(adb_server)
        return device

    yield make
    for device in devices:
        device.disconnect(adb_server)
        device.close()
        shutil.rmtree(device.folder, ignore_errors=True)


@pytest.fixture
def android(make_device: Callable[..., LoopbackDevice]) -> LoopbackDevice:
    """A phone."""
    return make_device("android")


@pytest.fixture
def linux(make_device: Callable[..., LoopbackDevice]) -> LoopbackDevice:
    """A board with Python, onnxruntime and onnxruntime-qnn."""
    return make_device("linux")


@pytest.fixture(scope="session")
def kept_device(
    tmp_path_factory: pytest.TempPathFactory, adb_server: AdbServer
) -> Iterator[Callable[[str], LoopbackDevice]]:
    """``kept_device("linux")``: a connected device of a flavour, the same for all tests that leave it as it was
    (:func:`tests.devices.as_before.as_before`)."""
    devices: dict[str, LoopbackDevice] = {}

    def get(flavor: str) -> LoopbackDevice:
        if flavor not in devices:
            devices[flavor] = device = LoopbackDevice(tmp_path_factory.mktemp(flavor), flavor=flavor)
            device.start()
            device.connect(adb_server)
        return devices[flavor]

    yield get
    for device in devices.values():
        device.disconnect(adb_server)
        device.close()


@pytest.fixture
def open_transport(adb_server: AdbServer) -> Iterator[Callable[[LoopbackDevice], AdbTransport]]:
    """A line to a device, through the tests' server."""
    transports: list[AdbTransport] = []

    def open_(device: LoopbackDevice) -> AdbTransport:
        transport = AdbTransport(adb_server, device.address)
        transports.append(transport)
        return transport

    yield open_
    for transport in transports:
        transport.close()
