"""What a compiled configuration must satisfy, whatever the committed table says."""

from rcmstr_fast.kernels.shipped import Configuration


def faults(configuration: Configuration, found: dict[str, int]) -> list[str]:
    """Why a compiled configuration may not be shipped (empty: it may).

    Args:
        configuration: what was compiled.
        found: the row of `build.Built`.
    """
    wrong = [f"{name} is {found[name]}, must be 0" for name in ("stack", "STL", "LDL") if found[name]]
    target, together = configuration.target, configuration.resident
    if found["shared"] > target.shared or together * (found["shared"] + 1024) > target.together:
        wrong.append(f"shared memory {found['shared']} does not fit {together} programs")
    if together * _registers(found["registers"]) * 32 * configuration.num_warps > 65536:
        wrong.append(
            f"{found['registers']} registers do not fit {together} programs of {configuration.num_warps} warps"
        )
    if found.get("serialised"):
        wrong.append("ptxas serialises the asynchronous products (C75xx)")
    if configuration.matrix:
        if not any(found.get(name) for name in target.products):
            wrong.append(f"no {target.products[0]}: the tensor cores are not used as intended")
        if found["buffers"] < configuration.num_stages - 1:
            wrong.append(f"{found['buffers']} pipeline buffers, {configuration.num_stages - 1} intended")
    return wrong


def _registers(number: int) -> int:
    """Registers that a thread is given: whole eights."""
    return -(-number // 8) * 8
