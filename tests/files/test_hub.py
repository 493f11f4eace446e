"""What the hub is asked for a name, once, and what serves where it does not answer."""

import pytest
from huggingface_hub.errors import RepositoryNotFoundError

from nextblock.files import hub


class FakeApi:
    """Has one repository of each type; knows when it is asked."""

    asked: list
    error: Exception | None = None

    def repo_info(self, repo_id, *, repo_type, timeout):
        self.asked.append((repo_id, repo_type))
        if FakeApi.error is not None:
            raise FakeApi.error
        if repo_id != "owner/there":
            raise RepositoryNotFoundError("404", response=FakeResponse())


class FakeResponse:
    headers, request, status_code = {}, None, 404


@pytest.fixture(autouse=True)
def _fake_hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    FakeApi.asked, FakeApi.error = [], None
    monkeypatch.setattr(hub, "HfApi", FakeApi)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)


def test_what_is_there_is_asked_for_once_and_loads_from_the_hub():
    assert hub.find_model("owner/there", "config.json") == {"local_files_only": False}
    hub.find_dataset("owner/there")
    assert FakeApi.asked == [("owner/there", "model"), ("owner/there", "dataset")]
    for path in ("out", "hf://datasets/owner/there", "buckets/owner/there"):
        hub.find_dataset(path)
    assert len(FakeApi.asked) == 2


@pytest.mark.parametrize("name", ["", "out/model", "./model", "/model", "a/b/c", "no..name"])
def test_names_of_nothing_are_not_asked_for(name):
    with pytest.raises(ValueError, match=r"^no such file$"):
        hub.find_model(name, "config.json", "file")
    assert not FakeApi.asked


def test_what_was_downloaded_serves_where_the_hub_does_not_answer(monkeypatch):
    with pytest.raises(ValueError, match="no such folder, and no such repository on the hub"):
        hub.find_model("owner/gone", "config.json")
    FakeApi.error = ConnectionError("no network")
    for find in (hub.find_dataset, lambda name: hub.find_model(name, "config.json")):
        with pytest.raises(ValueError, match="no such folder, and the hub does not answer: no network"):
            find("owner/there")
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_: "/kept/config.json")
    assert hub.find_model("owner/there", "config.json") == {"local_files_only": True}
    monkeypatch.setattr(hub, "_is_kept_dataset", lambda _: True)
    hub.find_dataset("owner/there")
