"""Which model a kept session belongs to."""

from deltamem.chat.runtime import ChatRuntime
from deltamem.server.metrics import Metrics
from deltamem.server.store import SessionStore, StoreLimits
from tests.tiny_models import make_chat_model


def test_a_session_stays_its_models_also_where_the_store_is_opened_again(tmp_path):
    runtimes = {name: ChatRuntime(*make_chat_model(strategy)) for name, strategy in [("one", "tsw"), ("other", "msw")]}
    for name, runtime in runtimes.items():
        store = SessionStore(runtimes, tmp_path, StoreLimits(), Metrics())
        store.put(name, f"of {name}", runtime.new_state())
        store.close()
    store = SessionStore(runtimes, tmp_path, StoreLimits(), Metrics())
    for name in runtimes:
        assert store.get(f"of {name}") is not None
        assert store.model(f"of {name}") == name
    store.close()
