"""The same server as replicas under Ray Serve, which routes requests, starts replicas and replaces those that die.

    serve run lococo.serve.ray:app contexts=/shared/contexts num_slots=512 min_replicas=2 max_replicas=8

All replicas keep contexts in one folder, so that any of them answers about a document that another one has read. Where
requests carry a header `x-session-id`, such as the id of their context, those of one id go to one replica as long as it
lives, which has that context and its conversations ready in memory.
"""

import contextlib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from lococo.options import ModelOptions, SlotOptions
from lococo.serve.app import make_app
from lococo.serve.gate import App, Receive, Scope, Send
from lococo.serve.journal import to_stream
from lococo.serve.keys import Keys
from lococo.serve.options import ServerOptions
from lococo.serve.state import State, started
from lococo.session import opened

ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"


class Arguments(BaseModel):
    """What `serve run` and a Serve config file may say.

    Attributes:
        contexts: Folder that all replicas share.
        model: As for `lococo serve`; None: the default model.
        compressor: The same.
        num_slots: The same.
        chunk_size: The same.
        api_keys: The same; without it only requests to this machine's own name are answered.
        max_batch: Requests that a replica reads or answers at a time.
        max_queue: Requests that wait at a replica beside them.
        max_new_tokens: Longest answer.
        timeout: Seconds after which a request is given up.
        min_replicas: Replicas that are always there.
        max_replicas: Replicas under load.
        cpus: Of each replica.
        gpus: The same.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    contexts: str
    model: str | None = None
    compressor: str = "auto"
    num_slots: int = 512
    chunk_size: int = 256
    api_keys: str | None = None
    max_batch: int = 16
    max_queue: int = 64
    max_new_tokens: int = 4096
    timeout: float = 600.0
    min_replicas: int = 2
    max_replicas: int = 8
    cpus: float = 1
    gpus: float = 0


class Replica:
    """Holds a model for as long as its process lives."""

    def __init__(self, given: dict[str, Any]) -> None:
        one = Arguments(**given)
        to_stream()
        self._held = contextlib.ExitStack()
        slots = SlotOptions(one.compressor, num_slots=one.num_slots, chunk_size=one.chunk_size)
        session = self._held.enter_context(opened(ModelOptions(one.model), slots))
        names = ("contexts", "api_keys", "max_batch", "max_queue", "max_new_tokens", "timeout")
        options = ServerOptions(shared=True, **{name: getattr(one, name) for name in names})
        keys = None if one.api_keys is None else Keys.read(Path(one.api_keys).expanduser())
        self._state: State = self._held.enter_context(started(session, options, keys))

    def __serve_build_asgi_app__(self) -> App:
        """Return the application; Ray Serve asks for it once the model is there."""
        return Named(make_app(self._state), serve.get_replica_context().replica_id.to_full_id_str())

    def check_health(self) -> None:
        """Let Ray Serve replace this replica when its engine has stopped."""
        if not self._state.engine.is_alive:
            raise RuntimeError("the engine has stopped")


class Named:
    """ASGI middleware that tells in a header which replica has answered.

    Args:
        app: What is behind it.
        name: Of the replica.
    """

    def __init__(self, app: App, name: str) -> None:
        self.app = app
        self.name = name.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""

        async def named(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"x-replica", self.name)]}
            await send(message)

        await self.app(scope, receive, named)


def app(arguments: Arguments) -> serve.Application:
    """Return the application that `serve run lococo.serve.ray:app` deploys.

    Args:
        arguments: See `Arguments`.
    """
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name="lococo",
        # The replica itself says 429 with Retry-After; Ray Serve only keeps those that would not even be told.
        max_ongoing_requests=arguments.max_batch + arguments.max_queue,
        autoscaling_config=AutoscalingConfig(
            min_replicas=arguments.min_replicas,
            max_replicas=max(arguments.min_replicas, arguments.max_replicas),
            target_ongoing_requests=arguments.max_batch,
        ),
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),
        ray_actor_options={"num_cpus": arguments.cpus, "num_gpus": arguments.gpus},
        graceful_shutdown_timeout_s=arguments.timeout,
        health_check_period_s=2,
        health_check_timeout_s=60,
    )
    return deployment.bind(arguments.model_dump())
