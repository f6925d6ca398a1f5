"""Jobs on a cluster that breaks, forgets, refuses and has no room: what is said, in one line, and what is done."""

import json
import threading
import time
from pathlib import Path

import pytest
from job_dashboards import LOG, JobDashboard
from result_peers import certificate, until

from cluster import cli, job, jobs_cli
from cluster import submit as submitting
from cluster.command_line import CommandLine
from cluster.connection import Cluster, reach
from cluster.errors import SubmitError
from cluster.submit import client_of, submit, submit_patiently

TRAIN = ("train", "--data", "s3://bucket/data", "--out", "s3://bucket/run")
COMMAND = CommandLine(TRAIN)


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """No cluster and no token of whoever runs the tests; and what the client sets is put back."""
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "CXR_RAY_CA_FILE"):
        # Set before it is deleted, so that it is restored to what it was.
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(job, "SECONDS_BETWEEN_ATTEMPTS", 0.2)
    monkeypatch.setattr(submitting, "SECONDS_BETWEEN_ATTEMPTS", 0.2)
    monkeypatch.setattr(submitting, "_SECONDS_TO_SHOW", 1.0)


def called(app: object, *arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(app(args=list(arguments), prog_name="cxr-ray", standalone_mode=False))
    return ended.value.code or 0


def to(dashboard: JobDashboard) -> list[str]:
    return ["--address", dashboard.address]


def cluster_of(dashboard: JobDashboard) -> Cluster:
    return Cluster(dashboard.address, {})


def when(condition: object, action: object) -> threading.Thread:
    def wait() -> None:
        until(condition)
        action()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_a_job_that_is_lost_with_its_head_has_failed_and_is_submitted_again(capsys):
    with JobDashboard(states=["RUNNING", "SUCCEEDED"]) as dashboard:
        lost = when(lambda: dashboard.jobs and "GET /api/jobs/" in str(dashboard.asked), dashboard.forget)
        started = time.monotonic()
        assert called(cli.submit, *to(dashboard), "--retries", "1", *TRAIN) == 0
        lost.join()
        assert time.monotonic() - started < 60
        said = capsys.readouterr()
        first, again = (line for line in said.out.splitlines() if line.startswith("raysubmit_"))
        assert f"job {first} failed: {dashboard.address} does not know it any more" in said.err
        assert "submitting it again (1 of 1)" in said.err
        assert list(dashboard.jobs) == [again]
        assert dashboard.jobs[again]["entrypoint"].endswith(" --resume")


def test_a_lost_job_without_retries_has_failed(capsys):
    with JobDashboard(states=["RUNNING"]) as dashboard:
        followed = submit(cluster_of(dashboard), COMMAND)
        dashboard.forget()
        notices: list[str] = []
        assert followed.follow(print, notices.append) == 1
    assert len(notices) == 1 and "does not know it any more" in notices[0]


def test_a_token_that_is_refused_later_is_said_at_once(tmp_path):
    (tmp_path / "token").write_text("old")
    with JobDashboard(states=["RUNNING"], token="old") as dashboard:
        followed = submit(reach(dashboard.address, tmp_path / "token"), COMMAND)

        def renew() -> None:
            dashboard.token = "new"
            dashboard.break_streams()

        renewed = when(lambda: any(asked.endswith("/tail") for asked in dashboard.asked), renew)
        started = time.monotonic()
        with pytest.raises(
            SubmitError, match=r"takes the token no more; give the cluster's own with --token-file\. Job raysub"
        ):
            followed.follow(print, print)
        renewed.join()
        assert time.monotonic() - started < 30
        with pytest.raises(SubmitError, match="refuses the token; give the cluster's own with --token-file"):
            followed.log()


def test_a_job_is_submitted_again_once_the_cluster_is_back():
    with JobDashboard() as dashboard:
        cluster = cluster_of(dashboard)
    notices: list[str] = []

    def come_back() -> None:
        time.sleep(1)
        with JobDashboard(port=dashboard.port) as another:
            until(lambda: another.jobs)
            time.sleep(1)

    back = threading.Thread(target=come_back, daemon=True)
    back.start()
    assert submit_patiently(cluster, COMMAND, notices.append).submission_id.startswith("raysubmit_")
    back.join()
    assert len(notices) == 1 and notices[0].endswith("trying again")


def test_a_cluster_that_stays_away_is_given_up(monkeypatch):
    monkeypatch.setattr(submitting, "SECONDS_OF_ATTEMPTS", 1.0)
    with JobDashboard() as dashboard:
        cluster = cluster_of(dashboard)
    with pytest.raises(SubmitError, match="does not take jobs"):
        submit_patiently(cluster, COMMAND, print)


def test_a_lost_answer_to_a_submission_is_asked_for():
    with JobDashboard(loses="answer") as dashboard:
        taken = submit(cluster_of(dashboard), COMMAND)
        assert list(dashboard.jobs) == [taken.submission_id]
        assert dashboard.asked.count("POST /api/jobs/") == 1
    with JobDashboard(loses="job") as dashboard, pytest.raises(SubmitError, match="the job was not taken"):
        submit(cluster_of(dashboard), COMMAND)
    with JobDashboard(loses="job") as dashboard:
        dashboard.add("mine", "echo of an earlier day")
        with pytest.raises(SubmitError, match="the job was not taken"):
            submit(cluster_of(dashboard), COMMAND, submission_id="mine")


def test_a_lost_answer_and_another_attempt_make_one_job():
    with JobDashboard(loses="answer") as dashboard:
        cluster = cluster_of(dashboard)
        when(lambda: dashboard.jobs, lambda: setattr(dashboard, "fails", 503))
        notices: list[str] = []
        when(lambda: notices, lambda: setattr(dashboard, "fails", None))
        taken = submit_patiently(cluster, COMMAND, notices.append)
        assert list(dashboard.jobs) == [taken.submission_id]


def test_an_id_that_was_used_before_is_an_error():
    with JobDashboard() as dashboard:
        submit(cluster_of(dashboard), COMMAND, submission_id="mine")
        with pytest.raises(SubmitError, match=r"the job was not taken .*mine already exists"):
            submit(cluster_of(dashboard), COMMAND, submission_id="mine")


@pytest.mark.parametrize("fails", [500, 502, 0])
@pytest.mark.parametrize("command", ["list", "logs", "logs --follow", "stop"])
def test_a_cluster_that_breaks_is_told_in_one_line(fails, command, capsys, monkeypatch):
    monkeypatch.setattr(job, "SECONDS_OF_ATTEMPTS", 0.5)
    name, *options = command.split()
    with JobDashboard() as dashboard:
        dashboard.add("a", "ls")
        dashboard.fails = fails
        assert called(jobs_cli.jobs, name, *to(dashboard), *options, *([] if name == "list" else ["a"])) == 1
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert said.err.startswith(f"cxr-ray: {dashboard.address}: does not ")


@pytest.mark.parametrize("fails", [500, 0])
def test_a_connection_that_stays_lost_while_a_log_is_followed_is_told(fails, capsys, monkeypatch):
    monkeypatch.setattr(job, "SECONDS_OF_ATTEMPTS", 0.5)
    with JobDashboard() as dashboard:
        dashboard.add("a", "ls")

        def lose() -> None:
            dashboard.fails = fails
            dashboard.break_streams()

        lost = when(lambda: any(asked.endswith("/tail") for asked in dashboard.asked), lose)
        assert called(jobs_cli.jobs, "logs", *to(dashboard), "--follow", "a") == 1
        lost.join()
    said = capsys.readouterr()
    assert said.out == LOG
    assert said.err.splitlines()[0].endswith("connection lost, the job goes on; trying again")
    assert said.err.splitlines()[1].startswith("cxr-ray: job a: connection lost (")
    assert said.err.count("\n") == 2


def test_jobs_are_listed_as_they_were_typed_but_for_credentials(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    commands = ["ls [/tmp]", "python -P -m cxr_ray train --data 's3://b/[x]'", "cp s3://AKIA123:SECRET/KEY@bucket/d x"]
    shown = ["ls [/tmp]", "train --data 's3://b/[x]'", "cp s3://***@bucket/d x"]
    with JobDashboard() as dashboard:
        for number, command in enumerate(commands):
            dashboard.add(f"job-{number}", command, "FAILED", message="lost https://u:SECRET@mlflow")
        assert called(jobs_cli.jobs, "list", *to(dashboard)) == 0
        table = capsys.readouterr().out
        assert called(jobs_cli.jobs, "list", *to(dashboard), "--json") == 0
        listed = capsys.readouterr().out
    for text in shown:
        assert text in table
    assert [each["command"] for each in reversed(json.loads(listed))] == shown
    assert "SECRET" not in table + listed


@pytest.mark.parametrize("given", [["--retries", "2"], ["--no-wait"], ["--num-cpus", "1"], ["--submission-id", "b"], ["train"]])
def test_what_is_said_of_another_job_is_no_part_of_attaching(given, capsys):
    with JobDashboard() as dashboard:
        assert called(cli.submit, *to(dashboard), "--attach", "a", *given) == 2
        assert dashboard.asked == []
    said = capsys.readouterr()
    assert said.err.startswith("cxr-ray: --attach a: follows a job that runs already; leave out ")
    assert given[0] in said.err


def test_a_reservation_that_no_node_can_hold_is_refused_before_anything_is_sent(capsys):
    with JobDashboard(nodes=(4, 16, 8)) as dashboard:
        assert called(cli.submit, *to(dashboard), "--num-cpus", "64", *TRAIN) == 1
        assert not any(asked.startswith("POST") for asked in dashboard.asked)
        said = capsys.readouterr()
        assert f"--num-cpus 64: the largest node of {dashboard.address} has 16 CPUs" in said.err
        assert (said.out, said.err.count("\n")) == ("", 1)
        assert called(cli.submit, *to(dashboard), "--num-cpus", "16", "--no-wait", *TRAIN) == 0
    with JobDashboard(grows=True) as dashboard:
        assert called(cli.submit, *to(dashboard), "--num-cpus", "64", "--no-wait", *TRAIN) == 0


def test_a_job_that_does_not_start_is_said_to_wait_once(monkeypatch):
    monkeypatch.setattr(job, "_SECONDS_TO_START", 0.3)
    monkeypatch.setattr(job, "_SECONDS_OF_SILENCE", 0.3)
    notices: list[str] = []
    with JobDashboard() as dashboard:
        dashboard.add(
            "a", "ls", "PENDING", "Job has not started yet. It may be waiting for resources (CPUs) to become available."
        )
        cluster = cluster_of(dashboard)

        def run() -> None:
            time.sleep(1.5)
            dashboard.jobs["a"]["status"] = "SUCCEEDED"

        when(lambda: notices, run)
        assert job.Job(client_of(cluster), cluster, "a").follow(print, notices.append) == 0
    assert notices == ["job a has not started after 0.3 s. It may be waiting for resources (CPUs) to become available."]


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> tuple[Path, Path]:
    return certificate(tmp_path_factory.mktemp("authority"), "hospital")


@pytest.fixture(scope="module")
def signed(authority, tmp_path_factory) -> tuple[Path, Path]:
    return certificate(tmp_path_factory.mktemp("signed"), "head", authority)


def test_a_certificate_of_ones_own_authority_is_trusted_by_all_that_asks(authority, signed, capsys, monkeypatch):
    ca_file = str(authority[0])
    with JobDashboard(tls=signed) as dashboard:
        assert called(cli.submit, *to(dashboard), "--ca-file", ca_file, *TRAIN) == 0
        said = capsys.readouterr()
        assert said.out.endswith(LOG), said.err
        assert any(asked.endswith("/logs/tail") for asked in dashboard.asked)
        assert said.err == ""
        (name,) = dashboard.jobs
        assert called(jobs_cli.jobs, "list", *to(dashboard), "--ca-file", ca_file) == 0
        assert name in capsys.readouterr().out
        monkeypatch.setenv("CXR_RAY_CA_FILE", ca_file)
        assert called(jobs_cli.jobs, "logs", *to(dashboard), "--follow", name) == 0
        assert capsys.readouterr().out == LOG
        assert reach(dashboard.address, None).options == f" --address {dashboard.address} --ca-file {ca_file}"


def test_a_certificate_that_is_not_trusted_is_told_with_its_remedy(authority, signed, capsys):
    with JobDashboard(tls=signed) as dashboard:
        for app, command in ((cli.submit, TRAIN), (jobs_cli.jobs, ("list",))):
            where = [*command, *to(dashboard)] if app is jobs_cli.jobs else [*to(dashboard), *command]
            assert called(app, *where) == 1
            said = capsys.readouterr().err
            assert said.startswith(f"cxr-ray: {dashboard.address}: its certificate is not trusted (")
            assert said.endswith("give the file with the authority that it comes from with --ca-file or CXR_RAY_CA_FILE\n")
        with pytest.raises(SubmitError, match=r"not trusted .*; give the file with the authority"):
            client_of(Cluster(dashboard.address, {}))
        with pytest.raises(SubmitError, match=r"not trusted \(.*; give an address that the certificate names with --address"):
            reach(dashboard.address.replace("127.0.0.1", "localhost"), None, authority[0])


def test_a_file_without_certificates_is_bad_usage(tmp_path, monkeypatch):
    (tmp_path / "none.pem").write_text("no certificate")
    with pytest.raises(SubmitError, match=rf"--ca-file {tmp_path}/none.pem: holds no certificates") as error:
        reach("https://127.0.0.1:9", None, tmp_path / "none.pem")
    assert error.value.code == 2
    monkeypatch.setenv("CXR_RAY_CA_FILE", str(tmp_path / "absent.pem"))
    with pytest.raises(SubmitError, match=r"CXR_RAY_CA_FILE .*/absent.pem: cannot be read \(No such file") as error:
        reach("https://127.0.0.1:9", None)
    assert error.value.code == 2


@pytest.mark.parametrize(
    ("given", "named", "remedy"),
    [
        (["--data", "s3://AKIA123:hunter2@bucket/d"], "--data:", "AWS_ACCESS_KEY_ID"),
        (["--data=s3://AKIA123:hun/ter2+@bucket/d"], "--data:", "AWS_ACCESS_KEY_ID"),
        (["--out", "s3://bucket/r?access_key=a&secret_key=hunter2"], "--out:", "AWS_ACCESS_KEY_ID"),
        (["--mlflow", "https://u:hunter2@mlflow"], "--mlflow:", "MLFLOW_TRACKING_USERNAME"),
        (["--mlflow", "https://hunter2@mlflow"], "--mlflow:", "MLFLOW_TRACKING_TOKEN"),
        (["--config", "SETTINGS"], "mlflow:", "MLFLOW_TRACKING_PASSWORD"),
    ],
)
def test_credentials_in_uris_are_refused_before_anything_is_sent(given, named, remedy, capsys, tmp_path):
    settings = tmp_path / "settings.yaml"
    settings.write_text("data: d\nmlflow: https://u:hunter2@mlflow\n")
    with JobDashboard() as dashboard:
        typed = ["train", "--out", "o", *(str(settings) if word == "SETTINGS" else word for word in given)]
        assert called(cli.submit, *to(dashboard), *typed) == 2
        assert dashboard.asked == []
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert named in said.err and remedy in said.err
    assert "ter2" not in said.err
