"""`PluginSession`: the hooks of a run with `--sglprof`. They delegate to `_run`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_sglprof._config.load import Settings, read_settings
from pytest_sglprof._config.model import ServerSpec
from pytest_sglprof._config.options import OPTIONS, shows_config
from pytest_sglprof._errors import (
    Incomparable,
    Inconclusive,
    SettingsError,
    SglprofError,
    described,
    note,
)
from pytest_sglprof._files import RUN_FILE, unwritten
from pytest_sglprof._plugin import invocation, xdist
from pytest_sglprof._plugin.header import header_lines, lacking_lines, unread_lines
from pytest_sglprof._plugin.markers import check_item, concerns, marked_window, server_spec
from pytest_sglprof._plugin.unittests import (
    drives_load,
    explain_missing,
    offer_attributes,
    parametrise,
    raise_what_it_raised,
)
from pytest_sglprof._plugin.verdicts import (
    SECTION,
    TerminalProgress,
    VerdictFailed,
    VerdictInconclusive,
    attach,
    attach_servers,
    hide_secrets,
    record_of_servers,
    set_properties,
    show_finding,
    take_records,
    write_summary,
)
from pytest_sglprof._process import uninterrupted
from pytest_sglprof._redact import learn_command, learn_environment, redact_text
from pytest_sglprof._run.attempt import ProfileWindow, TestRun
from pytest_sglprof._run.clean import swept
from pytest_sglprof._run.folder import RunBook, RunFolder, new_run_id, prune, run_facts
from pytest_sglprof._run.lives import KnownLives, TestLives, accept_lives
from pytest_sglprof._run.servers import close_server, describe_server, open_server
from pytest_sglprof._server.deployment import processes_of

if TYPE_CHECKING:
    from pytest_sglprof._report.model import RecordedServer
    from pytest_sglprof._server.launch import Server


TEST_RUN = pytest.StashKey[TestRun]()
ATTEMPTS = pytest.StashKey[int]()
EARLIER = pytest.StashKey[list[TestRun]]()  # attempts on the server lives before
UNREPORTED = pytest.StashKey[list[TestRun]]()
LIVES = pytest.StashKey[TestLives]()
# After these the windows of the test are dropped without a verdict.
DISCARDING = (
    *(pytest.skip.Exception, pytest.xfail.Exception, pytest.exit.Exception),
    *(KeyboardInterrupt, SystemExit),
)
ORDINALS = ("second", "third", "fourth")  # life of a test
# Lives of a run that was interrupted are not accepted.
ENDED = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
WORKER_INPUT = "sglprof_run_id"
PACKAGE = f"{Path(__file__).parents[1]}{os.sep}"


class PluginSession:
    """State of one pytest process: the settings, folder and book of the run, and the server."""

    def __init__(self, config: pytest.Config) -> None:
        from pytest_sglprof._server.command import keep_secrets

        self.config = config
        learn_environment(os.environ)
        learn_command(map(str, config.invocation_params.args))
        self.settings = _settings(config)
        keep_secrets(self.settings.servers.values())
        self._show_config = shows_config(config)
        self.worker = xdist.worker_name(config)
        self._base = invocation.base_of_names(config, self.settings.config_file)
        xdist.take_mode(config)
        workerinput: dict[str, Any] = getattr(config, "workerinput", {})
        self.run_id = str(workerinput.get(WORKER_INPUT) or new_run_id())
        self.folder = RunFolder(self.settings.output, self.run_id, worker=self.worker)
        self.progress = TerminalProgress(config, silent=bool(self.worker))
        self.server: Server | None = None
        self._quiet = contextlib.ExitStack()  # holds further Ctrl-C back
        config.add_cleanup(self._quiet.close)
        self._in_test = False
        self._unfinished: TestRun | None = None  # an attempt without a report
        self._known_lives = KnownLives(self.settings, self.run_id)
        self._left: list[RecordedServer] = []  # stopped servers with which something went wrong
        self._unwritten: list[str] = []  # a line for each file, for the next report
        command = ["pytest", *map(str, config.invocation_params.args)]
        facts = run_facts(command, self.settings)
        self._book = RunBook(self.settings.output, self.run_id, facts, self.settings.stored)

    # ---- the run -------------------------------------------------------------------------

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """xdist: lets workers write into the run of the controller."""
        node.workerinput[WORKER_INPUT] = self.run_id
        node.workerinput[xdist.GROUPS] = self.config.getoption("dist") == "loadgroup"

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Any) -> Any:
        """xdist: a loadgroup scheduler that continues after a worker crashed."""
        if config.getoption("dist") != "loadgroup":
            return None
        from pytest_sglprof._plugin.xdist_scheduler import CrashSafeScheduling, is_needed

        return CrashSafeScheduling(config, log) if is_needed() else None

    def pytest_report_header(self) -> list[str]:
        """One or two lines about the settings; all of them with `--sglprof-show-config`."""
        lines = header_lines(self.settings, self._book.folder)
        warnings = (xdist.mode_warning(self.config), invocation.rootdir_warning(self.config))
        if self._show_config:
            lines += self.settings.describe()
        return [*lines, *filter(None, warnings)]

    def pytest_report_collectionfinish(self, items: list[pytest.Item]) -> list[str]:
        """What of the configuration is not read, and what this machine lacks for these tests."""
        ours = list(filter(concerns, items))
        specs = {spec.key: spec for spec in map(self._server_spec, ours)}
        lines = lacking_lines(specs.values(), self.settings)
        if not (self.config.getoption("sglprof_config") or os.environ.get("SGLPROF_CONFIG")):
            folders = dict.fromkeys(item.path.parent for item in ours)
            lines += unread_lines(folders, self.settings, invocation.root_of_tests(self.config))
        return lines

    def pytest_sessionstart(self) -> None:
        """Creates the folder of the run, unless tests are only collected.

        Ends what runs that were killed have left: their GPUs and ports may be needed now.
        """
        option = self.config.option
        if not (self.worker or option.collectonly or self._show_config):
            try:
                self._book.open()
            except SettingsError as error:
                raise pytest.UsageError(redact_text(str(error))) from None
            with self._book.writing("what a run that was killed has left"):
                self._book.notes.extend(swept(self.settings.output))

    def pytest_collection(self) -> None:
        """Ends a run with `--sglprof-show-config` after the header, which shows the settings."""
        if self._show_config:
            pytest.exit("the effective settings of pytest-sglprof are shown above", returncode=0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """In the process that reports: adds the record that came with the report to the run."""
        for record in () if self.worker else take_records(report):
            self._book.add_lines(record.problems)
            self._book.add(record)

    @pytest.hookimpl(tryfirst=True)
    def pytest_keyboard_interrupt(self) -> None:
        """Until the fixtures are torn down, which may hang, pytest only notes the Ctrl-C."""
        self._quiet.enter_context(uninterrupted())

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_sessionfinish(
        self, session: pytest.Session, exitstatus: int | pytest.ExitCode
    ) -> Generator[None, Any, Any]:
        """Writes results.json and removes old runs, without changing the exit status.

        After a Ctrl-C here or in the teardown of fixtures, and after it, pytest would print no
        summary of the tests.
        """
        self._quiet.close()
        if self.worker:
            return (yield)
        result = None
        try:
            result = yield
            self._finish(exitstatus)
        except KeyboardInterrupt:
            session.exitstatus = pytest.ExitCode.INTERRUPTED
            session.shouldstop = "KeyboardInterrupt while results were written"
            self._book.problems.append(f"interrupted: {self._book.folder} is not complete")
        if session.exitstatus == pytest.ExitCode.INTERRUPTED:
            self._quiet.enter_context(uninterrupted())
        return result

    def _finish(self, exitstatus: int | pytest.ExitCode) -> None:
        is_interrupted = exitstatus == pytest.ExitCode.INTERRUPTED
        if is_interrupted:
            self._keep_unfinished()
        if self._left:  # an interrupted run stops its servers without a report
            self._book.add(record_of_servers(self._left))
        self._book.add_lines(self._unwritten)
        self._book.finish(int(exitstatus))
        if is_interrupted and self._book.file is not None:
            self._book.notes.append(
                "interrupted: what was recorded until then is in these files; "
                f"`sglprof report {self._book.folder}` makes the page again"
            )
        if self.settings.accept and exitstatus in ENDED:
            accept_lives(self.settings, self._book)
        prune(
            self.settings.output,
            keep_runs=self.settings.runs,
            keep_bytes=self.settings.max_gib * 2**30,
        )

    def _keep_unfinished(self) -> None:
        """Adds what the interrupted test had recorded; pytest makes no report of it."""
        test, self._unfinished = self._unfinished, None
        if test is not None and test.has_recorded:
            with self._book.writing("the interrupted test"):
                self._book.add(test.record("interrupted", ()))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Writes the section of the plugin, if there is anything to report."""
        book = self._book
        if not self.worker and (book.results is not None or book.problems or book.notes):
            write_summary(terminalreporter, book)

    # ---- collection ----------------------------------------------------------------------

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Passes the server to the session fixture as a parameter, known at collection."""
        if "sglang_server" not in metafunc.fixturenames:
            return
        spec = self._server_spec(metafunc.definition)
        metafunc.parametrize(
            "sglang_server", [spec], indirect=True, ids=[pytest.HIDDEN_PARAM], scope="session"
        )

    @pytest.hookimpl(wrapper=True)
    def pytest_pycollect_makeitem(self) -> Generator[None, Any, Any]:
        """Gives the methods of a marked `unittest.TestCase` the server as an attribute."""
        made = yield
        offer_attributes(made)
        return made

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        """Passes the server to methods of a `unittest.TestCase`, which are not generated."""
        parametrise(item, self.pytest_generate_tests)

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(
        self, collector: pytest.Collector
    ) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
        """Fails a module that has wrong markers, and lists all of them."""
        report = yield
        hide_secrets(report)
        if report.passed:
            problems = collection_problems(report.result, self.settings)
            if problems:
                report.outcome = "failed"
                report.longrepr = problems
                report.result = []
        return report

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keeps the tests of one server together, here and in the workers of xdist."""
        servers = {item: self._server_spec(item) for item in items if concerns(item)}
        items[:] = sort_by_server(items, servers)
        if self.worker or xdist.is_distributed(self.config):
            for item, spec in servers.items():
                xdist.add_group(item, spec)

    @pytest.hookimpl(wrapper=True)
    def pytest_collection_finish(self, session: pytest.Session) -> Generator[None]:
        """In a worker of xdist, which sends the node ids here: tests are grouped by them."""
        with xdist.grouped_ids(session.items if self.worker else ()):
            return (yield)

    # ---- tests ---------------------------------------------------------------------------

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Generator[None, Any, Any]:
        """Notes that a test is running, which can report errors of a server."""
        self._in_test = True
        try:
            return (yield)
        finally:
            self._in_test = False

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, None, None]:
        """Makes the attempt before the fixtures are set up, and prepares it after that."""
        if not concerns(item):
            return (yield)
        attempt = item.stash.get(ATTEMPTS, 0) + 1
        item.stash[ATTEMPTS] = attempt
        unreported = item.stash.setdefault(UNREPORTED, [])
        if TEST_RUN in item.stash and not unreported:
            item.stash[TEST_RUN].forget()
        test = item.stash[TEST_RUN] = TestRun(
            invocation.recorded_name(item, xdist.plain_nodeid(item.nodeid), self._base),
            attempt,
            self.settings,
            self.folder,
            marked_window(item, self.settings),
            drives_load=drives_load(item),
            progress=self.progress,
            lives=item.stash.setdefault(LIVES, TestLives(self._known_lives)),
        )
        self._unfinished = test
        try:
            self.folder.note_test(test.nodeid, attempt)
        except (OSError, ValueError) as error:
            self._unwritten.append(unwritten(RUN_FILE, error))
        test.earlier = item.stash.get(EARLIER, [])
        item.stash[EARLIER] = []
        unreported.append(test)
        with _shown_plainly():
            try:
                result = yield
            except AttributeError as error:
                explain_missing(error)
                raise
            test.prepare(self.server)
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, None, None]:
        """Opens and closes windows around the body; a bad verdict fails the test."""
        test = item.stash.get(TEST_RUN, None)
        if test is None:
            return (yield)
        with contextlib.ExitStack() as measuring:
            with _shown_plainly():
                measuring.enter_context(test.measuring())
                test.begin()
            test.is_in_body = True
            try:
                with _body(item, test):
                    yield
                    raise_what_it_raised(item)
            finally:
                test.is_in_body = False
                self.progress.clear()
        if not test.wants_life:
            self._raise_verdict(test)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Attaches the record, the properties and the rank table of the attempt."""
        test = item.stash.get(TEST_RUN, None)
        problems = []
        if test is not None and test.is_in_body:  # of a subtest, which is no attempt of its own
            report = yield
            test.has_failed_subtest = test.has_failed_subtest or report.failed
            hide_secrets(report)
            return report
        if test is not None and call.when == "call":
            with self._recording(item):
                problems = set_properties(item, test)
        report = yield
        show_finding(report, call.excinfo and call.excinfo.value)
        if test is not None and (call.when == "call" or (call.when == "setup" and report.failed)):
            with self._recording(item):
                attach(report, test, problems, item.stash[UNREPORTED])
            self._unfinished = None
        with self._recording(item):
            attach_servers(report, self._left, self._unwritten)
            self._left, self._unwritten = [], []
        if test is not None and call.when == "teardown":
            del item.stash[TEST_RUN]  # pytest keeps the item until it ends
            test.forget()
        hide_secrets(report)
        return report

    @contextlib.contextmanager
    def _recording(self, item: pytest.Item) -> Iterator[None]:
        """A record that cannot be made (too many open files) is a line, and not the run's end."""
        try:
            yield
        except Exception as error:
            self._unwritten.append(unwritten(f"the record of {item.nodeid}", error))

    def attach_last_attempt(self, item: pytest.Item, report: pytest.TestReport) -> None:
        """Attaches the attempts that a plugin made after the report, which it then changed.

        pytest-retry repeats setup and call while a report is made, and reports only the first.
        """
        test = item.stash.get(TEST_RUN, None)
        if test is None or test.is_in_body or report.when != "call" or not item.stash[UNREPORTED]:
            return
        with self._recording(item):
            problems = set_properties(item, test)
            report.user_properties[:] = item.user_properties
            others = [each for each in report.sections if not each[0].startswith(SECTION)]
            report.sections[:] = others
            attach(report, test, problems, item.stash[UNREPORTED])
        hide_secrets(report)

    def wants_life(self, item: pytest.Item) -> bool:
        """Whether the test needs one more server life for its verdict."""
        test = item.stash.get(TEST_RUN, None)
        return test is not None and test.wants_life

    def announce_life(self, item: pytest.Item, seconds: float) -> None:
        """Says what another life costs. seconds: what the one before took, without its start."""
        test = item.stash[TEST_RUN]
        ready = 0.0 if self.server is None else self.server.ready_s or 0.0
        number = ORDINALS[min(len(test.earlier), len(ORDINALS) - 1)]
        cost = about(seconds + ready)
        self.progress.announce(f"{test.nodeid}: confirming on a {number} life, {cost}")
        item.stash[EARLIER] = [*test.earlier, test]

    def _raise_verdict(self, test: TestRun) -> None:
        if test.verdict == "fail":
            raise VerdictFailed(test.message())
        if test.verdict == "inconclusive":
            if self.settings.allow_inconclusive:
                raise pytest.skip.Exception(f"inconclusive: {test.reason}", _use_item_location=True)
            raise VerdictInconclusive(test.message())

    # ---- what fixtures ask for -----------------------------------------------------------

    @contextlib.contextmanager
    def serve(self, spec: ServerSpec) -> Iterator[Server]:
        """Runs the server of `spec` during the block; its errors are shown without traceback."""
        with _shown_plainly():
            server = open_server(spec, self.settings, self.folder, self.progress)
        self.progress.clear()
        self.server = server
        try:
            yield server
        finally:
            self.server = None
            self._close(server)

    def _close(self, server: Server) -> None:
        try:
            with _shown_plainly():
                close_server(server)
        except (pytest.fail.Exception, KeyboardInterrupt) as error:
            if self._in_test:
                raise
            # After Ctrl-C no test can report it, and pytest would print no summary.
            what = str(error).partition("\n")[0] or "interrupted while it was stopped"
            self._book.problems.append(f"server {server.spec.key}: {what}")
        finally:
            self._unwritten.extend(server.problems)
            for each in processes_of(server):
                if each.left_behind or each.keeper_fault:
                    self._left.append(describe_server(each, self.folder.path))

    def test_run(self, item: pytest.Item) -> TestRun:
        """The current attempt of `item`, with its server."""
        test = item.stash[TEST_RUN]
        test.server = self.server
        return test

    def profile_window(self, item: pytest.Item) -> ProfileWindow:
        """The value of the fixture `profile_window`."""
        return ProfileWindow(self.settings, self.test_run(item).new_by_hand, item.name)

    def _server_spec(self, node: Any) -> ServerSpec:
        try:
            return server_spec(node, self.settings)
        except SettingsError:
            return ServerSpec()  # pytest_make_collect_report reports the mistake


def about(seconds: float) -> str:
    """`about 26 s`, `about 4 min`: what a test is expected to take."""
    return f"about {seconds:.0f} s" if seconds < 90 else f"about {seconds / 60:.0f} min"


@contextlib.contextmanager
def _shown_plainly() -> Iterator[None]:
    """Lets pytest show errors of this package without a traceback: their text is enough."""
    try:
        yield
    except SglprofError as error:
        raise pytest.fail.Exception(described(error), pytrace=False) from None


@contextlib.contextmanager
def _body(item: pytest.Item, test: TestRun) -> Iterator[None]:
    """Closes and judges the windows after the body, even if it raises."""
    try:
        yield
    except Inconclusive as error:
        try:
            test.abandon(discard=False, is_incomparable=isinstance(error, Incomparable))
        except SglprofError as later_error:
            note(error, f"and besides: {later_error}")
        finally:
            test.inconclusive(described(error))
    except BaseException as error:
        _abandon(error, test)
        if isinstance(error, SglprofError):
            _cut_traceback(error, item)
        raise
    else:
        with _shown_plainly():
            test.end()


def _abandon(error: BaseException, test: TestRun) -> None:
    """Ends the windows after a body that raised `error`; their errors become notes of it."""
    try:
        test.abandon(
            discard=isinstance(error, DISCARDING),
            keep_closed=isinstance(error, KeyboardInterrupt),
        )
    except Exception as later_error:
        if isinstance(error, (pytest.skip.Exception, pytest.xfail.Exception)):
            raise  # pytest does not show the notes of a skipped test
        note(error, f"and besides: {described(later_error)}")


def _cut_traceback(error: SglprofError, item: pytest.Item) -> None:
    """Cuts the traceback where the test calls this package: the text of the error is enough."""
    in_test, last = False, None
    entry = error.__traceback__
    while entry is not None:
        file = entry.tb_frame.f_code.co_filename
        in_test = in_test or file == str(item.path)
        if in_test and file.startswith(PACKAGE):
            break
        last, entry = entry, entry.tb_next
    if in_test and last is not None:
        last.tb_next = None
        error.__cause__, error.__suppress_context__ = None, True


def _settings(config: pytest.Config) -> Settings:
    folder = config.invocation_params.dir
    tests = [folder / arg.split("::")[0] for arg in config.args]
    try:
        extra: dict[str, Any] = {}
        for answer in config.hook.pytest_sglprof_servers(config=config):
            extra.update(answer or {})
        return read_settings(
            {option.name: config.getoption(option.dest) for option in OPTIONS if option.pytest},
            os.environ,
            start=[test for test in tests if test.exists()],
            rootdir=invocation.root_of_tests(config),
            invocation_dir=folder,
            of_pytest=True,
            extra_servers=extra,
        )
    except SettingsError as error:
        raise pytest.UsageError(redact_text(str(error))) from None


def collection_problems(nodes: Sequence[Any], settings: Settings) -> str:
    """The mistakes in the markers of the tests in `nodes`, one a line; "" if there are none."""
    problems = []
    for node in nodes:
        if isinstance(node, pytest.Item) and concerns(node):
            problem = check_item(node, settings)
            if problem is not None:
                problems.append(problem)
    return "\n".join(problems)


def sort_by_server(
    items: Sequence[pytest.Item], servers: Mapping[pytest.Item, ServerSpec]
) -> list[pytest.Item]:
    """Groups tests by server, in a stable order; tests without a server keep their places."""
    order: dict[str, int] = {}
    for item in items:
        if item in servers:
            order.setdefault(servers[item].key, len(order))
    sorted_items = iter(
        sorted((item for item in items if item in servers), key=lambda i: order[servers[i].key])
    )
    return [next(sorted_items) if item in servers else item for item in items]
