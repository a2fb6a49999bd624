"""What a server has loaded, by its counters."""

from __future__ import annotations

from sere_sglang.measure.routing import counted_exactly
from sere_sglang.measure.server import Server


class Weigher:
    """Experts and bytes that a server has loaded since its counters were reset.

    A surrogate counts as loaded for every expert that a batch lost.
    """

    def __init__(self, server: Server, num_experts: int) -> None:
        self.server = server
        state, served = server.sere(), server.get("/server_info")["sere"]
        self.layers = len(served["layers"])
        self.top_k: int = state["top_k"]
        shapes = served["cost"]["shapes"]
        expert = {int(i): s["expert_bytes"] for s in shapes for i in s["layers"]}
        whole = served["surrogate_bytes"]
        # A cost file may not know what an expert weighs.
        self._surrogate = {
            i: whole.get(str(i), 0) / num_experts / max(b, 1) for i, b in expert.items()
        }

    def counts_exactly(self) -> None:
        """From now on, of exact routing."""
        self.server.set_sere(**counted_exactly(self.top_k), reset_counters=True)

    def active(self) -> float:
        """Experts executed per forward, summed over layers."""
        rows = self.server.sere()["counters"].values()
        return sum(row["active_after"] / row["forwards"] for row in rows)

    def steps(self) -> float:
        """Forwards that were re-routed; a policy may leave others exact, which nothing counts."""
        rows = self.server.sere()["counters"].values()
        return max((row["forwards"] for row in rows), default=0)

    def shares(self) -> dict[str, float]:
        """Of what exact routing would load: experts, bytes. 1 where no forward was re-routed."""
        state = self.server.sere()
        with_surrogates = state["rule"] == "energy" and state["surrogates"]
        before = after = weight = 0.0
        for layer, row in state["counters"].items():
            before += row["active_before"]
            after += row["active_after"]
            lost = row["active_before"] - row["active_after"]
            weight += lost * self._surrogate[int(layer)] * with_surrogates
        if not before:
            return {"active_share": 1.0, "bytes_share": 1.0}
        return {"active_share": after / before, "bytes_share": (after + weight) / before}
