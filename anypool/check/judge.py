"""From what a compiler said to a verdict."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from anypool.check.memory import predict
from anypool.check.options import capacity, describe
from anypool.check.processes import Outcome
from anypool.check.question import Question
from anypool.check.result import Result
from anypool.check.roofline import bound, tier
from anypool.chips import Target
from anypool.models.counts import decode_flops_per_token, forward_flops_per_token, train_flops_per_token

VLLM_ASCEND = ("llama", "mistral", "qwen2", "qwen3")
"""Model types that vLLM-Ascend lists as supported. Source: vllm-ascend 0.11, supported models; 2026-11-23."""


def unanswered(target: Target, job: str, reason: str, proof: str = "nothing was compiled") -> Result:
    """The result where no compiler could be asked."""
    return Result(str(target), job, "failed", proof, reason, hbm_capacity_bytes=capacity(target.chip))


def judge(
    question: Question, target: Target, outcome: Outcome, platform: str, compiler: str, host_bytes: int
) -> Result:
    """The verdict on a question that a process has answered, wholly or in part.

    target: what was asked about. host_bytes: memory of this machine, which is the CPU target's.
    """
    answer = outcome.answer
    base = _base(question, target, answer, host_bytes)
    base = replace(base, log=str(outcome.log), proof=_proof(answer, platform, compiler))
    if "refused" in answer:
        return replace(base, verdict="rejected", proof="not lowered", reason=answer["refused"])
    if outcome.failure is not None:
        return replace(base, verdict="failed", proof="nothing was proven", reason=outcome.failure)
    if "rejected" in answer:
        return replace(base, verdict="rejected", reason=f"the compiler refuses it: {answer['rejected']}")
    if base.errors:
        first = base.errors[0]
        return replace(base, verdict="rejected", reason=f"{first['rule']} at {first['where']}: {first['what']}")
    return _with_memory(base, question, answer)


def _base(question: Question, target: Target, answer: dict[str, Any], host_bytes: int) -> Result:
    chip = target.chip
    found = [
        collective | {"tier": tier(chip, collective["groups"]), "program": program["name"]}
        for program in answer.get("programs", [])
        for collective in program.get("collectives", [])
    ]
    main: dict[str, Any] = next(iter(answer.get("programs", [])), {})
    traffic = main.get("hbm_traffic_bytes")
    flops = answer.get("flops")
    model = model_flops(question)
    compiled = [p["compile_seconds"] for p in answer.get("programs", []) if "compile_seconds" in p]
    # Without a program, the least that has to be moved: what is kept, read once.
    moved = traffic if traffic is not None else least_traffic(question)
    times = bound(question, flops or model, moved, found)
    room = capacity(chip) if chip.name != "cpu" else host_bytes // question.devices
    return Result(
        target=str(target),
        job=question.job,
        verdict="failed",
        proof="",
        setting=describe(question),
        mesh=question.mesh,
        workers=question.workers,
        batch=question.batch,
        seq=question.seq,
        dtype=question.dtype,
        hbm_capacity_bytes=room,
        predicted_hbm_bytes=predict(question),
        findings=answer.get("findings", []),
        kernels=answer.get("kernels", {}),
        flops=flops,
        model_flops=model,
        hbm_traffic_bytes=traffic,
        # The devices of each group are for us; a report names the axis.
        collectives=[{name: value for name, value in one.items() if name != "groups"} for one in found],
        seconds_per_step=times.seconds,
        bound_by=times.by,
        bounds={"compute": times.compute, "memory": times.memory, "network": times.network},
        measured_seconds=answer.get("measured_seconds"),
        compile_seconds=sum(compiled) if compiled else None,
        unknown_loops=answer.get("unknown_loops", 0),
    )


def _proof(answer: dict[str, Any], platform: str, compiler: str) -> str:
    named = answer.get("proof", compiler)
    if platform == "neuron":
        found = [finding for finding in answer.get("findings", []) if finding["severity"] == "error"]
        if "compiler" not in answer or found:
            return f"{named} and linted; memory predicted, not compiled"
        asked = "refused by" if "rejected" in answer else "compiled with"
        return f"{asked} {answer['compiler']}; memory predicted"
    if platform == "rocm":
        return f"code generation only, {named}"
    ran = ", one step run" if answer.get("measured_seconds") is not None else ""
    return f"compiled with {named}{ran}"


def _with_memory(base: Result, question: Question, answer: dict[str, Any]) -> Result:
    programs = answer.get("programs", [])
    refused = next((p for p in programs if "out_of_memory" in p), None)
    if refused is not None:
        said = refused["out_of_memory"]
        predicted = sum(base.predicted_hbm_bytes.values())
        base = replace(
            base,
            hbm_bytes_per_device=said["wanted"] if said["whole"] else max(predicted, said["wanted"]),
            hbm_capacity_bytes=said["there"] or base.hbm_capacity_bytes,
            hbm_source="compiler" if said["whole"] else "predicted; the compiler ran out of memory",
        )
        return replace(base, verdict="does_not_fit", reason=_lacks(base))
    measured = [program["memory"] for program in programs if "memory" in program]
    if measured:
        sizes = max(measured, key=needed)
        base = replace(base, hbm_bytes_per_device=needed(sizes), hbm_parts=sizes, hbm_source="compiler")
    else:
        predicted = sum(base.predicted_hbm_bytes.values())
        base = replace(base, hbm_bytes_per_device=predicted, hbm_source="predicted")
    if base.hbm_capacity_bytes is None:
        return replace(base, verdict="fits", reason="no source says how much memory a device has; not compared")
    if base.missing_bytes:
        return replace(base, verdict="does_not_fit", reason=_lacks(base))
    return replace(base, verdict="fits")


def needed(sizes: dict[str, int]) -> int:
    """What a program holds on a device: arguments, results that are not in their place, temporaries and code."""
    return sizes["arguments"] + sizes["outputs"] - sizes["aliased"] + sizes["temporaries"] + sizes["code"]


def _lacks(base: Result) -> str:
    lacking = base.missing_bytes
    return f"{(lacking or 0) / 2**30:.2f} GiB a device too much"


def estimate(question: Question, target: Target) -> Result:
    """The result for a chip that no JAX compiler knows (Ascend): from the chip's file and the model's shape."""
    base = _base(question, target, {}, 0)
    base = replace(base, kernels={}, hbm_source="predicted", collectives=[])
    if question.job == "train":
        reason = (
            f"no JAX compiler exists for {target.chip.title}: train on another pool; the checkpoint is a Hugging Face "
            "directory, which PyTorch and MindSpore read there"
        )
        return replace(base, verdict="unsupported", proof="no JAX path exists", reason=reason)
    kind = question.model.model_type
    if kind not in VLLM_ASCEND:
        reason = f"vLLM-Ascend does not list {kind}"
        return replace(base, verdict="unsupported", proof="no JAX path exists", reason=reason)
    # Its engine attends in place: nothing is gathered.
    parts = {name: size for name, size in base.predicted_hbm_bytes.items() if name != "activations"}
    base = replace(base, predicted_hbm_bytes=parts, hbm_bytes_per_device=sum(parts.values()))
    base = replace(base, proof="estimated from the chip's file; no JAX path exists", flops=base.model_flops)
    served = "served by vLLM-Ascend from the exported Hugging Face directory, as an external pool"
    if base.hbm_capacity_bytes is not None and base.missing_bytes:
        return replace(base, verdict="does_not_fit", reason=_lacks(base))
    return replace(base, verdict="fits", reason=served)


def model_flops(question: Question) -> int:
    """Operations a step has to do, recomputation left out; conventions as in `models.counts`."""
    config, seq = question.model, question.seq
    if question.job == "train":
        return round(question.tokens * train_flops_per_token(config, seq))
    if question.job == "decode":
        return round(question.batch * decode_flops_per_token(config, seq))
    # The last tokens of a prompt; only one of each stream is projected onto the vocabulary.
    before = seq - question.chunk
    whole = seq * forward_flops_per_token(config, seq)
    known = before * forward_flops_per_token(config, before) if before else 0.0
    spared = 2.0 * config.vocab_size * config.hidden_size * (question.chunk - 1)
    return round(question.batch * (whole - known - spared))


def least_traffic(question: Question) -> int:
    """Bytes one device moves in a step at least: weights and cache once; of training, its state there and back."""
    parts = predict(question)
    if question.job == "train":
        return 2 * (parts["parameters"] + parts["optimizer"]) + 2 * parts["gradients"] + 2 * parts.get("activations", 0)
    return parts["parameters"] + parts["kv_cache"]
