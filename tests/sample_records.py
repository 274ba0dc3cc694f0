"""Records as runs write them, with numbers that are made up."""

import math
import random

LSP = {"weight": 100.0, "student_layer": "layers.0", "teacher_layer": "layers.1", "args": {}}
LOSSES = {"student-alone": {}, "lsp": {"lsp": LSP}, "kd + lsp": {"kd": {"weight": 1.0}, "lsp": LSP}}


def network(test, seed, losses=(), parameters=1234, epochs=20):
    history = [
        {
            "epoch": e,
            "loss": 2.0 / (e + 1),
            "val": test - 40 / (e + 1) + 0.1 * seed,
            "seconds": 0.01 * e,
            "terms": {"task": 1.0 / (e + 1), **{name: 0.1 / (e + 1) for name in losses}},
        }
        for e in range(epochs)
    ]
    return {
        "test": test,
        "val": history[-1]["val"],
        "best_epoch": epochs - 1,
        "epochs": epochs,
        "seconds": 3.0 + seed,
        "parameters": parameters,
        "peak_memory_mb": 10.0 + seed,
        "history": history,
        "cost": {
            "parameters": parameters,
            "mmacs": parameters / 100,
            "latency_ms": 0.5 + seed,
            "threads": 2,
            "peak_memory_mb": None,
        },
    }


def record(test, seed, losses, data="cora", picture=False, hidden=8):
    model = lambda hidden: {"model": {"name": "gcn", "args": {"hidden": hidden}}, "train": {"epochs": 20}}
    out = {
        "schema": 1,
        "seed": seed,
        "student": network(test, seed, losses),
        "teacher": network(95.5, 0, (), 98765),
        "config": {
            "data": data,
            "teacher": model(64),
            "student": model(hidden),
            "task_weight": 1.0,
            "losses": losses,
            "teacher_seed": 0,
        },
        "environment": {"fastkd": "9.8.7", "torch": "2.13.0", "threads": 2},
    }
    if picture:
        points = [[math.cos(i), math.sin(2 * i), 0.1 * (i % 3)] for i in range(60)]
        distance = [i / 59 for i in range(60)]
        out["picture"] = {
            "points": points,
            "at": 0,
            "teacher": distance,
            "student": distance[::-1],
            "teacher_layer": "layers.1",
            "student_layer": "layers.0",
        }
    return out


def compressed(algorithm="ecs", seed=0, test=91.0, tuned=True, genes=(6, 10), score="accuracy", int8=True):
    rng = random.Random(seed)
    size = sum(genes)

    def costs(share):
        return {
            "parameters": round(1000 * share),
            "macs": round(40000 * share),
            "filters": 10,
            "bytes": round(4000 * share),
            "latency_ms": {"1": 0.5 * share, "64": 9.0 * share},
            "peak_memory_mb": {"1": share, "64": 20 * share},
        }

    searched = algorithm not in ("l1", "torch-pruning")
    n = 40 if searched else 1
    ids = [f"{rng.randrange(16**12):012x}" for _ in range(n)]
    columns = {"quality": [rng.random() for _ in ids], "cost": [rng.randrange(1, 16000) for _ in ids]}
    mask = lambda: bytes(rng.randrange(256) for _ in range(-(-size // 8))).hex()
    stages = {"masked": {"test": 50.0, "val": 51.0}, "recalibrated": {"test": test - 3, "val": 89.0}}
    stages |= {"finetuned": {"test": test, "val": 92.5}} if tuned else {}
    history = [{"epoch": e, "loss": 1 / (e + 1), "val": 90 + e, "lr": 0.1} for e in range(3)] if tuned else []
    last = list(stages.values())[-1]
    return {
        "schema": 1,
        "kind": "compress",
        "seed": seed,
        "score": score,
        "environment": {"fastkd": "9.8.7", "threads": 2},
        "config": {"data": "mnist", "model": {"name": "lenet", "args": {}}, "algorithm": {"name": algorithm}},
        "dense": {**costs(1.0), "test": 93.25 + seed, "val": 94.0, "seconds": 5.0, "history": []},
        "compact": {**costs(0.25), **last, "stages": stages, "seconds": 3.0, "history": history},
        "int8": {"test": 90.5, "val": 90.0, "bytes": 500, "latency_ms": {"1": 0.05, "64": 1.0}} if int8 else None,
        "onnx": None,
        "layers": [{"name": f"conv{k}", "size": g, "kept": g // 2} for k, g in enumerate(genes)],
        "search": {
            "algorithm": algorithm,
            "quality": "accuracy",
            "cost": "macs",
            "full_quality": 0.97,
            "full_cost": 40000,
            "evaluations": n,
            "seconds": 12.5,
            "chosen": ids[-1],
            "mask": mask(),
            "history": [
                {
                    "generation": g + 1,
                    "best": 0.8 + g / 100,
                    "quality": 0.8,
                    "cost": 9000,
                    "mean": 0.7,
                    "diversity": 0.4,
                    "hypervolume": 0.5 + g / 100,
                    "evaluations": 10 * g,
                    "seconds": g,
                    "mask": mask(),
                }
                for g in range(4)
            ]
            if searched
            else [],
            "individuals": {"id": ids, **columns},
            "front": {"id": ids[:2], **{k: v[:2] for k, v in columns.items()}},
            "l1": {"density": [0.5, 1.0], "quality": [0.6, 0.97], "cost": [11000, 40000]},
        },
    }
