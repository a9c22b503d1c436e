"""What one device of a mesh takes: memory, bytes sent and a bound on time."""

import dataclasses

from keras_moe import architecture, checks
from keras_moe.distribution import traffic
from keras_moe.units import bytes_text


@dataclasses.dataclass(frozen=True)
class DevicePlan:
    """What a training step takes of one device of a mesh; see `keras_moe.plan`.

    Attributes:
        mesh: dict of the axes' names to their sizes.
        platform: str.
        devices: int, of the mesh.
        transfers: tuple of `Transfer`: what it sends, by collective and purpose.
        flops: int, floating-point operations of the step.
        weight_bytes: int, its part of the weights.
        gradient_bytes: int, of the gradients, once summed.
        optimizer_bytes: int, of the optimizer's variables.
        gathered_bytes: int, of weights in the shape and dtype that products take,
            where that is not how they are stored.
        activation_bytes: int, kept for the gradient.
        exchange_bytes: int, the buffers in which rows of one mixture travel, and
            what its experts compute anew.
    """

    mesh: dict
    platform: str
    devices: int
    transfers: tuple
    flops: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    gathered_bytes: int
    activation_bytes: int
    exchange_bytes: int

    @property
    def training_bytes(self):
        """All that a device holds in training, an int."""
        return (
            self.weight_bytes
            + self.gradient_bytes
            + self.optimizer_bytes
            + self.gathered_bytes
            + self.activation_bytes
            + self.exchange_bytes
        )

    @property
    def sent_bytes(self):
        """All that a device sends in a step, an int."""
        return sum(transfer.sent_bytes for transfer in self.transfers)

    def sent_by(self, field="kind"):
        """What a device sends, as a dict by `"kind"` or `"purpose"`."""
        found = {}
        for transfer in self.transfers:
            key = getattr(transfer, field)
            found[key] = found.get(key, 0) + transfer.sent_bytes
        return found

    def step_seconds(
        self,
        flops_per_second,
        bytes_per_second,
        node_devices=None,
        network_bytes_per_second=None,
    ):
        """A lower bound on the time of a training step.

        A device cannot compute faster than its rate nor send faster than its links,
        and at best does all at once, so the step takes at least the longest of

        - `flops / flops_per_second`, where the work is shared evenly;
        - the bytes that stay within a node, over `bytes_per_second`;
        - the bytes that leave it, over `network_bytes_per_second`. All-to-all sends
          abroad what is not for the f devices of its own node, `(n - f) / n` of it;
          other collectives go round the nodes with `1 / f` of it from each device.

        Left out, and so the real step is longer: what waits for what, latencies,
        reading and writing memory, uneven loads of experts, everything that is no
        matrix product, and the input. Switches that reduce in passing can halve what
        an all-reduce sends.

        Args:
            flops_per_second: float, a device's peak in the dtype of the products.
            bytes_per_second: float, what a device can send to those of its node, or
                to all.
            node_devices: int or None: how many devices, that follow each other in the
                mesh, make a node; None: all.
            network_bytes_per_second: float, a device's share of what its node can
                send to others; needed with `node_devices`.

        Returns:
            float, seconds.

        Raises:
            ValueError: for rates that are not positive, and where one of the last
                two is given without the other.

        Example:

        ```python
        device = keras_moe.plan("mixtral_8x7b", 64, 4096, mesh={"expert": 8}).device
        device.step_seconds(flops_per_second=989e12, bytes_per_second=450e9)
        ```
        """
        checks.positive("flops_per_second", flops_per_second)
        checks.positive("bytes_per_second", bytes_per_second)
        if (node_devices is None) != (network_bytes_per_second is None):
            raise ValueError(
                "`node_devices` and `network_bytes_per_second` go together. Received: "
                f"node_devices={node_devices!r}, "
                f"network_bytes_per_second={network_bytes_per_second!r}"
            )
        times = [self.flops / flops_per_second]
        abroad = 0.0
        if node_devices is not None:
            checks.at_least("node_devices", node_devices, 1)
            checks.positive("network_bytes_per_second", network_bytes_per_second)
            abroad = self.bytes_between_nodes(node_devices)
            times.append(abroad / network_bytes_per_second)
        times.append((self.sent_bytes - abroad) / bytes_per_second)
        return max(times)

    def bytes_between_nodes(self, node_devices):
        """What of `sent_bytes` must leave a node of so many devices, a float."""
        return sum(
            transfer.bytes_between_nodes(
                traffic.devices_in_node(self.mesh, transfer.axes, node_devices)
            )
            for transfer in self.transfers
        )

    def to_dict(self):
        """All figures as a dict that JSON can hold, by name."""
        return {
            **dataclasses.asdict(self),
            "transfers": [
                {**transfer._asdict(), "axes": list(transfer.axes)}
                for transfer in self.transfers
            ],
            "training_bytes": self.training_bytes,
            "sent_bytes": self.sent_bytes,
        }

    def __str__(self):
        axes = ", ".join(f"{name} {size}" for name, size in self.mesh.items())
        memory = [
            ("weights", self.weight_bytes),
            ("gradients", self.gradient_bytes),
            ("optimizer", self.optimizer_bytes),
            ("gathered weights", self.gathered_bytes),
            ("activations", self.activation_bytes),
            ("exchange buffers", self.exchange_bytes),
            ("total", self.training_bytes),
        ]
        sent = [(f"{t.purpose} ({t.kind})", t.sent_bytes) for t in self.transfers]
        total = ("total", self.sent_bytes)
        rows = [
            (f"each of {self.devices} devices", axes),
            ("operations a step", f"{self.flops / 1e12:.4g} TFLOP"),
            ("memory in training", ""),
            *((f"  {name}", bytes_text(number)) for name, number in memory),
            ("sent a step", ""),
            *((f"  {name}", bytes_text(n)) for name, n in [*sent, total]),
        ]
        return "\n".join(f"{a:<34}{b:>14}".rstrip() for a, b in rows)


def device_plan(
    mesh,
    stacks,
    weights,
    batch_size,
    sequence_length,
    sizes,
    slots,
    factors,
    kept,
    flops_per_token,
    platform,
):
    """The `DevicePlan` of a model on a mesh.

    Args:
        mesh: see `keras_moe.plan`.
        stacks: the settings of each stack.
        weights: list of every weight.
        batch_size: int, sequences of all devices.
        sequence_length: int.
        sizes: pair of int, the bytes of a weight and of an activation.
        slots: int, the copies of a weight that the optimizer keeps.
        factors: callable: the further elements it keeps for a weight.
        kept: callable: the bytes that a token keeps for the gradient in a model of
            given stacks.
        flops_per_token: int, of the forward pass.
        platform: str, see `keras_moe.plan`.
    """
    checks.one_of("platform", platform, traffic.PLATFORMS)
    spread = traffic.Spread(mesh)
    spread.check_batch(batch_size)
    shards = traffic.shards(spread, weights)
    tokens = batch_size * sequence_length
    of_device = tokens // spread.count(spread.batch_axes)
    weight_size, value_size = sizes

    def stored(shards):
        return sum(s.stored * s.weight.count * _size(s.weight) for s in shards)

    def _size(weight):
        return traffic.FLOAT32 if weight.float32 else weight_size

    trained = [s for s in shards if s.weight.trainable]
    gradient_bytes = stored(trained)
    ways = [
        (s, traffic.exchange(spread, s, tokens, sequence_length, platform))
        for s in stacks
        if architecture.mixture_layers(s)
    ]
    rounds = [s for s, way in ways if way is not None and not way.once]
    anew = sum(w.active * w.count for w in weights if w.part == "experts" and rounds)
    passes = 4 if stacks[0]["recompute"] else 3
    local = [_of_model_axis(s, spread, s in rounds) for s in stacks]
    return DevicePlan(
        mesh=dict(spread.sizes),
        platform=platform,
        devices=spread.count(spread.sizes),
        transfers=traffic.transfers(
            spread, stacks, shards, tokens, sequence_length, value_size, platform
        ),
        flops=tokens
        * (passes * flops_per_token + 2 * anew)
        // spread.count(spread.sizes),
        weight_bytes=stored(shards),
        gradient_bytes=gradient_bytes,
        # Factors have no layout of their own.
        optimizer_bytes=slots * gradient_bytes
        + sum(factors(s.weight) * s.weight.count * _size(s.weight) for s in trained),
        gathered_bytes=_gathered(shards, stacks[0]["recompute"], sizes),
        activation_bytes=of_device * kept(local),
        exchange_bytes=max(
            (_exchanged(s, way, spread) * value_size for s, way in ways), default=0
        ),
    )


def _of_model_axis(s, spread, rounds):
    """The settings of what a device of the model axis computes."""
    m = spread.sizes.get("model", 1)
    shared = architecture.shared_dim(s)
    local = dict(s)
    if s["vocabulary_size"] % m == 0:  # else it lies whole
        local["vocabulary_size"] //= m
    for name in ("num_query_heads", "num_key_value_heads", "dense_dim", "expert_dim"):
        if local[name]:
            local[name] //= m
    if shared:
        local["shared_expert_dim"] = shared // m
    if rounds:  # no hidden features are kept: they are computed anew
        local["expert_dim"] = 0
    return local


def _gathered(shards, recompute, sizes):
    """Bytes of weights as products take them, where stored otherwise.

    They stay from the forward to the backward pass; with `recompute`, those of one
    layer at a time.
    """
    weight_size, value_size = sizes
    total = 0
    for shard in shards:
        weight = shard.weight
        if not weight.multiplied or weight.float32:
            continue
        if not shard.storage_axes and weight_size == value_size:
            continue
        count = 1 if recompute else weight.count
        total += shard.gathered * count * value_size
    return total


def _exchanged(s, way, spread):
    """Numbers in the buffers of a mixture, and what is computed of them anew."""
    if way is None:
        return 0
    D = s["hidden_dim"]
    if way.once:
        return way.buffer * 2 * D
    # Rows and gradients, sent and received, and the hidden features of experts.
    m = spread.sizes.get("model", 1)
    hidden = (4 if s["expert_gated"] else 2) * s["expert_dim"] // m
    return way.buffer * (4 * D + hidden)
