"""A model that qnn-net-run runs on a device, each time in a process of its own.

Everything of one call goes together: one push, one run over all inputs, one pull, as far as the device's space allows. The
performance mode that was asked for is a vote of that process, so it ends with it: between runs the device clocks as it likes.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path, PurePosixPath

from pytest_qnn.artifacts.matching import Match
from pytest_qnn.devices.attached import AttachedDevice
from pytest_qnn.devices.runtime_files import RuntimeFiles
from pytest_qnn.devices.transport import part
from pytest_qnn.errors import ArtifactError, BackendUnavailableError, DeviceSpaceError, ExecutionError, OptionError
from pytest_qnn.model.onnx_file import file_digest
from pytest_qnn.runners.loaded import Inference, Timing
from pytest_qnn.runners.net_run.command import (
    BACKEND_LIBRARIES,
    SUFFIXES,
    Executable,
    data_arguments,
    dsp_folders,
    extensions,
    model_arguments,
)
from pytest_qnn.runners.net_run.invocation import (
    OUTPUT,
    SHELL_SECONDS,
    Finished,
    Invocation,
    Usage,
    check_outputs,
    free_bytes,
    invocation,
)
from pytest_qnn.runners.net_run.log import Surroundings, stand_in_notes
from pytest_qnn.runners.net_run.names import check_names, input_line
from pytest_qnn.runners.net_run.profiling import find_viewer, read_log, times_ms
from pytest_qnn.runners.net_run.raw_files import RawFile, raw_files
from pytest_qnn.runners.process import Limits
from pytest_qnn.runners.profile import Event, Profile
from pytest_qnn.runners.shared_tensors import Array
from pytest_qnn.sdk.installation import NET_RUN
from pytest_qnn.targets.backend_config import EXTENSION_LIBRARIES, write_backend_extensions
from pytest_qnn.targets.target import Plan

MIB = 1 << 20
RESERVE_BYTES = 32 * MIB  # of the device's space, not to be filled with inputs and outputs
ASK_BYTES = 16 * MIB  # from here on the free space is asked for
CHUNK_BYTES = 512 * MIB  # of inputs and outputs in one run: they pass through this host's memory
CHUNK_SAMPLES = 2000
WARM_UP = 1  # inferences at the start of each timed process, which wake the accelerator and aren't reported
PILOT = 8  # timed inferences where their time isn't known yet
MOST_TIMED = 10_000


class NetRunModel:
    """A model on a device, run by qnn-net-run.

    Args:
        device: where.
        executable: what: a context binary, model library or DLC.
        match: the model's tensors and the binary's.
        runtime: from :func:`~pytest_qnn.runners.net_run.command.runtime_for`.
        plan: backend and options.
        subject: for messages.
        limits: seconds to start and to load, seconds per inference; memory is not limited there.
        io: "native": files have the binary's own elements, and floats are quantised here as ONNX's QuantizeLinear does it;
            "float": qnn-net-run quantises and dequantises, in its own arithmetic, which may differ by a step.

    Attributes:
        loads: how often its files were put on the device.
        notes: what the program said of itself that belongs into records; a stand-in names itself there.

    Raises:
        ArtifactError: tensors or names that qnn-net-run can't handle, or the file isn't what it was.
        OptionError: an option that qnn-net-run doesn't have, or ``io`` is unknown.
        DeviceError: the device is lost, full, or refuses files.
    """

    def __init__(
        self,
        device: AttachedDevice,
        executable: Executable,
        match: Match,
        runtime: RuntimeFiles,
        plan: Plan,
        subject: str,
        limits: Limits,
        io: str = "native",
    ) -> None:
        if io not in ("native", "float"):
            raise OptionError(f"{subject}: files of qnn-net-run are 'native' or 'float', got {io!r}")
        if executable.kind == "context binary" and plan.backend != "htp":
            raise ArtifactError(
                f"{executable.path}: context binaries are for htp, not for {plan.backend}: take a model library or a DLC"
            )
        self.device, self.executable, self.match, self.runtime = device, executable, match, runtime
        self.plan, self.subject, self.limits, self.io = plan, subject, limits, io
        self.loads = 0
        self.notes: tuple[str, ...] = ()
        path = executable.path
        graph = match.graph
        self._inputs = _in_order(raw_files(match.inputs, io, path), [t.name for t in graph.inputs])
        self._outputs = _in_order(raw_files(match.outputs, io, path), [t.name for t in graph.outputs])
        check_names([t.name for t in graph.inputs], [t.name for t in graph.outputs], path)
        self._data = data_arguments(graph.name, self._inputs, self._outputs, path)
        self._extensions = extensions(plan, executable, graph.name)
        self._local = device.folder()
        self._runs = 0
        self._generation: int | None = None
        self._arguments: list[str] = []
        self._folder = ""  # of the runtime, in the workspace
        self._inference_seconds = 0.0  # as last timed
        self._provide()

    # --- its files on the device --------------------------------------------------------------------------------------

    def _provide(self) -> None:
        """See that runtime, model and configuration are in the workspace; after a recovery that is a new one."""
        device = self.device
        if self._generation == device.generation:
            return
        executable, local = self.executable, dict(self.runtime.local)
        try:
            with part(device.transport, f"qnn-net-run for {self.plan.backend}"):
                stored = device.store.put(local, executable=[NET_RUN])
            stored |= self.runtime.on_device
            known = executable.sha256 or file_digest(executable.path)
            with part(device.transport, f"{executable.path.name} ({known[:16]}) for qnn-net-run"):
                model = device.store.put({"model": executable.path})["model"]
                digest = PurePosixPath(model).name[:64]
                if executable.sha256 and digest != executable.sha256:
                    raise ArtifactError(f"{executable.path} changed on disk since it was read: load it again")
                self._folder = f"{device.workspace.path}/{self._link(stored, model, digest)}"
                config = self._configure()
        except OSError as error:
            raise ArtifactError(
                f"{error.filename or executable.path}: can't be read: {error.strerror or error}. Correct the path or make it again"
            ) from error
        link = f"{device.workspace.path}/model-{digest[:16]}/model{SUFFIXES[executable.kind]}"
        backend = BACKEND_LIBRARIES[self.plan.backend]
        self._arguments = ["--backend", f"{self._folder}/{backend}", *model_arguments(executable, link, self._folder)]
        self._arguments += [*config, *self._data]
        self._generation = device.generation
        self.loads += 1

    @property
    def versions(self) -> dict[str, str]:
        """Of the device's runtime, by names for records."""
        return {"device_qnn": self.runtime.version}

    def _link(self, runtime: Mapping[str, str], model: str, digest: str) -> str:
        """Link the files into the workspace; returns the folder of the runtime there, which is named by its content."""
        text = "\n".join(f"{name} {path}" for name, path in sorted(runtime.items()))
        folder = f"runtime-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        links = {f"{folder}/{name}": path for name, path in runtime.items()}
        links[f"model-{digest[:16]}/model{SUFFIXES[self.executable.kind]}"] = model
        self.device.workspace.link(links)
        return folder

    def _configure(self) -> list[str]:
        """Send the backend's configuration, if there is one; returns the arguments for it."""
        inner, outer = self._extensions
        if not inner and not outer:
            return []
        library = EXTENSION_LIBRARIES[self.plan.backend]
        if library not in self.runtime.local and library not in self.runtime.on_device:
            raise BackendUnavailableError(
                f"{self.subject}: options of {self.plan.backend} need {library}, which the runtime from {self.runtime.origin} "
                "lacks: take the whole runtime, or leave the options out"
            )
        text = repr((inner, outer, library)).encode()
        where = f"{self.device.workspace.path}/config-{hashlib.sha256(text).hexdigest()[:16]}"
        folder = self._work()
        try:
            config = write_backend_extensions(folder, f"{self._folder}/{library}", inner, outer, where)
            files: dict[str, Path | bytes] = {f"{where}/{f.name}": f.read_bytes() for f in folder.iterdir()}
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self.device.transport.push(files, timeout=SHELL_SECONDS)
        return ["--config_file", f"{where}/{config.name}"]

    def _work(self) -> Path:
        """A new local folder; whoever asks for it removes it."""
        self._runs += 1
        folder = self._local / str(self._runs)
        folder.mkdir(parents=True)
        return folder

    # --- running ------------------------------------------------------------------------------------------------------

    def run_many(self, samples: Sequence[Mapping[str, Array]]) -> list[Inference]:
        """One inference for each sample, in order, all in one process as far as the device's space allows.

        ``round_trip_seconds`` of each is the mean over those that went together; ``seconds`` is NaN, for the program times
        nothing here.

        Raises:
            InputError: a value that the binary's type doesn't have.
            ArtifactError, CompileError: the device's runtime refused the model.
            TargetError: the program failed, crashed, hung or wrote something else than it should; the device is gone.
        """
        self._provide()
        done: list[Inference] = []
        for chunk in self._chunks(samples):
            done += self._run(chunk)
        return done

    def _chunks(self, samples: Sequence[Mapping[str, Array]]) -> Iterator[Sequence[Mapping[str, Array]]]:
        """Samples whose inputs and outputs fit the device together."""
        each = sum(raw.size for raw in (*self._inputs, *self._outputs))
        count = min(CHUNK_SAMPLES, max(1, CHUNK_BYTES // max(each, 1)))
        if each * min(count, len(samples)) >= ASK_BYTES:
            free = free_bytes(self.device.transport, self.device.workspace.path)
            if free is not None:
                count = min(count, (free - RESERVE_BYTES) // each)
            if count < 1:
                raise DeviceSpaceError(
                    f"{self.subject}: no space left on the device: inputs and outputs of one inference take {each / MIB:.1f} MiB, "
                    f"{(free or 0) / MIB:.1f} MiB are free and {RESERVE_BYTES // MIB} MiB stay so. Free some: pytest-qnn device "
                    f"{self.device.transport.serial} clean"
                )
        for start in range(0, len(samples), count):
            yield samples[start : start + count]

    def _run(self, samples: Sequence[Mapping[str, Array]]) -> list[Inference]:
        transport = self.device.transport
        start = transport.clock()
        wanted = {
            f"{OUTPUT}/Result_{number}/{raw.edge.tensor.name}{raw.suffix}": raw.size
            for number in range(len(samples))
            for raw in self._outputs
        }
        folder = self._work()
        try:
            with self._invocation() as run:
                self._execute(run, samples, [], len(samples), list(wanted))
                files = run.fetch(wanted, folder)
            seconds = (transport.clock() - start) / len(samples)
            return [Inference(self._decode(files, n), math.nan, seconds) for n in range(len(samples))]
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _invocation(self) -> AbstractContextManager[Invocation]:
        device = self.device
        device.workspace.beat()
        near = Surroundings(
            self.subject,
            self.executable.path.name,
            self._folder,
            ";".join(dsp_folders(self._folder, device.facts.os)),
            device.facts.htp_arch if self.plan.backend == "htp" else None,
        )
        return invocation(device.transport, device.workspace.path, near)

    def _execute(
        self,
        run: Invocation,
        samples: Sequence[Mapping[str, Array]],
        arguments: Sequence[str],
        inferences: int,
        wanted: Sequence[str],
    ) -> Finished:
        """Send inputs, run the program, see that it wrote what it should."""
        files: dict[str, bytes] = {}
        lines = []
        for number, sample in enumerate(samples):
            paths = {}
            for index, raw in enumerate(self._inputs):
                name = f"in{number}_{index}.raw"
                files[name] = raw.encode(sample[raw.edge.spec.name], self.subject)
                paths[raw.edge.tensor.name] = f"{run.path}/{name}"
            lines.append(input_line(paths))
        files["input_list.txt"] = "".join(f"{line}\n" for line in lines).encode()
        run.send(files)
        words = [*self._arguments, "--input_list", f"{run.path}/input_list.txt", "--output_dir", f"{run.path}/{OUTPUT}"]
        timeout = self.limits.load_seconds + inferences * self.limits.run_seconds
        finished = run.run(f"{self._folder}/{NET_RUN}", [*words, *arguments], timeout)
        self.notes = tuple(dict.fromkeys((*self.notes, *stand_in_notes(list(finished.log)))))
        both = [n.replace("_native.raw", ".raw") for n in wanted] if "float_and_native" in self._data else []
        check_outputs(finished.files, wanted, both, self.subject)
        return finished

    def _decode(self, files: Mapping[str, Path], number: int) -> dict[str, Array]:
        arrays = {}
        for raw in self._outputs:
            file = files[f"{OUTPUT}/Result_{number}/{raw.edge.tensor.name}{raw.suffix}"]
            arrays[raw.edge.spec.name] = raw.decode(file.read_bytes(), self.subject)
            file.unlink()
        return {edge.spec.name: arrays[edge.spec.name] for edge in self.match.outputs}

    # --- timing -------------------------------------------------------------------------------------------------------

    def time(self, inputs: Mapping[str, Array], count: int, seconds: float, reset_peak: bool = False) -> Timing:
        """Time up to ``count`` single inferences within about ``seconds``, all in one process.

        The times are those that qnn-net-run measures on the device around the execution of the graph, by its profiling log;
        the first one of the process is left out. Memory and processor time are those of the whole process.

        Raises:
            BackendUnavailableError: there is no qnn-profile-viewer here to read the log.
            QnnError: as for :meth:`run_many`.
        """
        known = self._inference_seconds
        wanted = min(count, MOST_TIMED, max(1, int(seconds / known)) if known else PILOT)
        total = wanted + WARM_UP
        events, usage = self._profiled(
            inputs, "basic", total, ["--num_inferences", str(total), "--keep_num_outputs", "1"]
        )
        times = times_ms(events)
        if not WARM_UP < len(times) <= total:
            raise ExecutionError(
                f"{self.subject}: the profile has the times of {len(times)} inferences, {total} ran: this release of the SDK may "
                "write something else"
            )
        times = times[WARM_UP:]
        self._inference_seconds = sum(times) / len(times) / 1e3
        return Timing(times, usage.peak_memory_mib, usage.cpu_share)

    def profile(self, inputs: Mapping[str, Array]) -> Profile:
        """The runtime's own events of one inference.

        Raises:
            BackendUnavailableError: there is no qnn-profile-viewer here to read the log.
            QnnError: as for :meth:`run_many`.
        """
        return Profile(self._profiled(inputs, "detailed", 1, [])[0])

    def _profiled(
        self, inputs: Mapping[str, Array], level: str, inferences: int, arguments: Sequence[str]
    ) -> tuple[tuple[Event, ...], Usage]:
        sdk = find_viewer(self.subject)
        self._provide()
        wanted = [f"{OUTPUT}/Result_0/{raw.edge.tensor.name}{raw.suffix}" for raw in self._outputs]
        folder = self._work()
        try:
            with self._invocation() as run:
                words = ["--profiling_level", level, *arguments]
                finished = self._execute(run, [inputs], words, inferences, wanted)
                logs = sorted(n for n in finished.files if n.startswith(f"{OUTPUT}/qnn-profiling-data"))
                if not logs:
                    raise ExecutionError(
                        f"{self.subject}: qnn-net-run wrote no profiling log, although it was asked for one: this release may "
                        "not have it"
                    )
                (log,) = run.fetch({logs[0]: None}, folder).values()
            return read_log(sdk, log, self.subject), finished.usage
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    # --- its life -----------------------------------------------------------------------------------------------------

    def clock(self) -> float:
        """Seconds from an arbitrary start."""
        return self.device.transport.clock()

    def close(self) -> None:
        """Nothing runs between calls; its files go with the workspace."""
        shutil.rmtree(self._local, ignore_errors=True)


def _in_order(files: tuple[RawFile, ...], names: Sequence[str]) -> tuple[RawFile, ...]:
    """In the binary's own order, which counts where an input list has no names."""
    by_name = {raw.edge.tensor.name: raw for raw in files}
    return tuple(by_name[name] for name in names)
