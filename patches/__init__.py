"""One module per SGLang seam that has no extension point, and the list of them all.

sere_sglang/plugin.py and scheduler.py say when each is installed, seam.py how a symbol is taken
hold of, this table what and why. Symbols are dotted paths in SGLang, so they name the file to look
at when a release has changed them.

Versions: all of them are tested with `TESTED_VERSIONS` and nothing else. A symbol that is gone, or
has lost a parameter, stops the start by name (`seam.SeamError`); pyproject.toml asks for the same
versions. What to do about a new one: CONTRIBUTING.md.

No patch, since SGLang offers the way in: `add_moe_runner_backend_choices` and
`register_moe_runner_backend_name` (SGLang PR 32665), and the entry points in pyproject.toml.
"""

from __future__ import annotations

from typing import NamedTuple

TESTED_VERSIONS = ("0.5.23",)
"""The SGLang releases that this repository's tests have run on, oldest first."""


class Patch(NamedTuple):
    """What one module of this folder changes in SGLang.

    hooks: symbols that go through `seam.hook` or `seam.declare`, checked and guarded.
    assigned: symbols that are set, registered or wrapped otherwise, or that we add.
    remove: what SGLang would have to offer for the module to be deleted.
    """

    module: str
    why: str
    remove: str
    hooks: tuple[str, ...] = ()
    assigned: tuple[str, ...] = ()


_RUNNER = "sglang.srt.model_executor.model_runner.ModelRunner"

PATCHES = (
    # In the launcher
    Patch(
        "server_args",
        "Our flags in the command line and in --config; the profile is checked before workers "
        "start; /server_info shows the options.",
        "plugins may declare flags, and see the resolved record",
        hooks=(
            "sglang.srt.server_args.ServerArgs.add_cli_args",
            "sglang.srt.server_args.ServerArgs.from_cli_args",
            "sglang.srt.server_args.ServerArgs.resolve_once",
            "sglang.srt.server_args.ServerArgs.resolved_dict",
        ),
    ),
    Patch(
        "engine",
        "Our keywords of sglang.Engine; no server comes up unless every scheduler confirms SERE.",
        "a plugin that fails stops the start, and flags of plugins are keywords too",
        hooks=("sglang.srt.entrypoints.engine.Engine._launch_subprocesses",),
        assigned=("sglang.srt.entrypoints.engine.Engine.server_args_class",),
    ),
    Patch(
        "dp_controller",
        "Under --dp-size the controller passes on only what it knows of the schedulers' handshake.",
        "it passes on what schedulers report",
        hooks=(
            "sglang.srt.managers.data_parallel_controller.DataParallelController.get_init_info",
        ),
    ),
    Patch(
        "request_quality",
        "A request that asks for a quality the server does not offer is answered with status 400.",
        "plugins may validate custom_params",
        hooks=("sglang.srt.managers.tokenizer_manager.TokenizerManager._create_tokenized_object",),
    ),
    Patch(
        "token_ids",
        "A request whose input_ids are outside the vocabulary ends the scheduler; it is answered "
        "with status 400.",
        "requests are checked for it",
        hooks=("sglang.srt.managers.tokenizer_manager.TokenizerManager._create_tokenized_object",),
    ),
    Patch(
        "shadow",
        "--sere-shadow: a sampled request gets its likeliest tokens, and is scored again once it "
        "has finished.",
        "plugins may see what requests get",
        hooks=(
            "sglang.srt.managers.tokenizer_manager.TokenizerManager._create_tokenized_object",
            "sglang.srt.managers.tokenizer_manager.TokenizerManager._handle_batch_output",
        ),
    ),
    Patch(
        "http_server",
        "The route's body is typed as numbers only; ours takes an object and says what is wrong.",
        "/set_internal_state takes objects",
        assigned=("sglang.srt.entrypoints.http_server.app",),
    ),
    # In every scheduler
    Patch(
        "scheduler",
        "The first code of a worker that knows the flags installs the rest; the handshake reports "
        "SERE.",
        "a plugin entry point that is called with the worker's ServerArgs",
        hooks=(
            "sglang.srt.managers.scheduler.Scheduler.__init__",
            "sglang.srt.managers.scheduler.Scheduler.get_init_info",
        ),
    ),
    Patch(
        "weight_files",
        "A checkpoint without an index loads every *.safetensors of its folder, a profile too.",
        "the loader takes only files that hold the model's weights",
        hooks=("sglang.srt.model_loader.loader.DefaultModelLoader._prepare_weights",),
    ),
    Patch(
        "model_runner",
        "Stages are bound once the weights are there and no CUDA graph is; the operating point is "
        "written before each forward, graph or eager.",
        "callbacks after loading and before a forward",
        hooks=(f"{_RUNNER}.load_model", f"{_RUNNER}.forward"),
    ),
    Patch(
        "cuda_graphs",
        "Prefill graphs are captured without our launch; each decode graph is looked at once it is "
        "captured.",
        "callbacks around the capture of a graph",
        hooks=(
            "sglang.srt.model_executor.runner.prefill_cuda_graph_runner.PrefillCudaGraphRunner"
            ".capture",
            "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner"
            ".capture_one_shape",
        ),
    ),
    Patch(
        "forward_batch",
        "The last place that has the requests: what each asked for goes with the forward.",
        "custom_params travel on the ForwardBatch",
        hooks=("sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new",),
    ),
    Patch(
        "topk",
        "Re-routing itself: logical ids right after top-k, before capture, placement, padding "
        "masks and dispatch; with a plain softmax router in one launch with it.",
        "a hook between top-k and its post-processing",
        hooks=(
            "sglang.srt.layers.moe.topk._post_process_topk_ids",
            "sglang.srt.layers.moe.topk.select_experts",
            "sglang.srt.layers.moe.topk.fused_topk",
        ),
    ),
    Patch(
        "surrogates",
        "Rule energy: a layer's output gets what low-rank stand-ins of the "
        "experts that its tokens lost make of its input.",
        "callbacks around MoE layers",
        hooks=("sglang.srt.layers.moe.fused_moe_triton.layer.FusedMoE.forward",),
    ),
    Patch(
        "rank_decision",
        "What one rank measured, or that it failed, reaches all ranks before the same batch.",
        "plugins may broadcast with the requests",
        hooks=(
            "sglang.srt.managers.scheduler_components.request_receiver.SchedulerRequestReceiver"
            "._pull_raw_reqs",
            "sglang.srt.managers.scheduler.Scheduler.process_input_requests",
        ),
    ),
    Patch(
        "internal_state",
        "/server_info shows SERE's state, /set_internal_state changes it.",
        "plugins may add a section to the internal state",
        hooks=(
            "sglang.srt.managers.scheduler_components.internal_state"
            ".SchedulerInternalStateController.get_internal_state",
            "sglang.srt.managers.scheduler_components.internal_state"
            ".SchedulerInternalStateController.set_internal_state",
        ),
    ),
    Patch(
        "decode_log",
        "The 'Decode batch' line says what SERE did; it is built in one function.",
        "plugins may add to the line",
        assigned=("sglang.srt.managers.scheduler_components.metrics_reporter",),
    ),
    # The CPU engine
    Patch(
        "cpu_engine",
        "sgl_kernel cannot be imported without libcuda, and no CPU build of it is published.",
        "a CPU wheel of sgl_kernel is published",
        assigned=("sgl_kernel",),
    ),
    Patch(
        "cpu_attention",
        "SGLang's torch-native backend attends request by request while it decodes; while SERE is "
        "on, one operator does for the batch.",
        "it does so itself, or a CPU wheel of sgl_kernel is published",
        hooks=(
            "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"
            "._run_sdpa_forward_decode",
        ),
    ),
    Patch(
        "cpu_models",
        "On the CPU engine: a torch form of Qwen2-MoE's gate, absorbed attention for DeepSeek-V2, "
        "the length of a padding row under --enable-dp-attention, a MoE that passes over ids of -1 "
        "under --ep-size.",
        "SGLang's CPU engine runs these without AMX",
        hooks=(
            "sglang.srt.layers.moe.fused_moe_native.moe_forward_native",
            "sglang.kernels.ops.elementwise.elementwise.fused_gate_sigmoid_mul",
            "sglang.kernels.ops.elementwise.elementwise.fused_gate_sigmoid_mul_add",
        ),
        assigned=(
            "sglang.srt.models.deepseek_common.attention_backend_handler.AttentionBackendRegistry",
            "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"
            ".get_cpu_graph_seq_len_fill_value",
        ),
    ),
    Patch(
        "cpu_verify",
        "On the CPU engine: attention of draft tokens under their tree's mask.",
        "SGLang's torch-native attention backend verifies drafts",
        hooks=(
            "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"
            ".forward_extend",
        ),
    ),
    Patch(
        "cpu_pinning",
        "On the CPU engine: no pinned memory in LoRA and in a disaggregated server's host pool.",
        "SGLang pins memory only where there is a GPU",
        assigned=(
            "sglang.srt.lora.layers.torch",
            "sglang.srt.lora.backend.torch_backend.torch",
            "sglang.srt.mem_cache.pool_host.common._cuda_host_register",
            "torch.Tensor.pin_memory",
        ),
    ),
    Patch(
        "cpu_moe",
        "SGLang's MoE without AMX loads experts for slots of weight 0, which re-routing leaves "
        "where slots met; ours replaces it while SERE is on, and its weights move to large pages "
        "once they are loaded.",
        "it skips such slots, and reads each active expert's weights once",
        hooks=(
            f"{_RUNNER}.load_model",
            "sglang.srt.layers.moe.fused_moe_native.moe_forward_native",
        ),
    ),
    Patch(
        "cpu_weights",
        "On the CPU engine, while SERE is on: what reads or changes weights gets them as they were "
        "loaded; our MoE packs them where they are.",
        "SGLang's own functions, called with the rows back in place",
        hooks=(
            "sglang.srt.layers.moe.fused_moe_native.moe_forward_native",
            *(
                f"sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater.{of}"
                for of in (
                    "update_weights_from_disk",
                    "begin_weight_update",
                    "load_weights_from_distributed",
                    "update_weights_from_tensor",
                    "update_weights_from_ipc",
                )
            ),
            *(
                f"sglang.srt.model_executor.model_runner_components.weight_exporter.WeightExporter.{of}"
                for of in (
                    "send_weights_to_remote_instance",
                    "save_remote_model",
                    "save_sharded_model",
                    "get_weights_by_name",
                )
            ),
            "sglang.srt.utils.weight_checker.WeightChecker.handle",
        ),
    ),
    # What runs a model without serving it
    Patch(
        "calibration",
        "sere-sglang calibrate: a MoE layer's input with its chosen experts; a method that "
        "Engine.collective_rpc calls; a worker's death ends the run instead of the process.",
        "callbacks around MoE layers, and errors of workers raised from Engine's calls",
        hooks=(
            "sglang.srt.layers.moe.fused_moe_triton.layer.FusedMoE.forward",
            f"{_RUNNER}.load_model",
            f"{_RUNNER}.forward",
            "sglang.srt.entrypoints.engine._set_envs_and_config",
            "sglang.srt.managers.tokenizer_manager.TokenizerManager.auto_create_handle_loop",
        ),
        assigned=("sglang.srt.managers.scheduler.Scheduler.sere_calibration",),
    ),
    Patch(
        "doctor",
        "sere-sglang doctor --model: where a MoE layer can run and nothing serves yet.",
        "a callback after loading",
        hooks=(f"{_RUNNER}.load_model",),
    ),
)

TOOLS = {
    "seam": "how a symbol is hooked, and how it fails when it has changed",
    "guard": "what becomes of a hook that fails while the server serves",
    "cpu_drafts": "operators on trees of draft tokens, for cpu_engine's stand-in",
    "moe_rows": "whose rows a MoE layer sees under DP attention and all-to-all; changes nothing",
    "moe_runner": "a runner that takes standard top-k where SGLang chose another, by SGLang's own "
    "register_resolution_hook",
    "server_flags": "flags of SGLang's under which SERE is refused; changes nothing",
    "number_keys": "settings as numbers, on the way to the schedulers",
}
"""The other modules of this folder."""

PINNED = {
    "_sere_config": "ServerArgs: the options (config.py)",
    "_sere_fallback": "ServerArgs: why the server goes without SERE (config.py)",
    "_sere_from_cli": "ServerArgs: made from a command line, whose errors exit (server_args.py)",
    "_sere_collection": "ServerArgs: what a calibration collects (calibration.py)",
    "_sere_doctor": "ServerArgs: doctor's question (doctor.py)",
    "_sere_noted": "ForwardBatch: what its requests asked for (forward_batch.py)",
    "_sere_packed": "FusedMoE: its experts as our CPU runner reads them (cpu_weights.py)",
    "_sere_stage": "TopKConfig, FusedMoE: their layer's stage (sere_sglang/runtime/stage.py)",
    "_sere": "endpoint of /set_internal_state: it is ours already (http_server.py)",
}
"""Every attribute that we put on an object of SGLang's."""

PROCESS_STATE = {
    "sere_sglang.runtime.process._asked": "what this scheduler process was asked for",
    "sere_sglang.runtime.process._current": "the runtime of this scheduler process",
    "sere_sglang.runtime.process._without": "why this scheduler process goes without SERE",
    "sere_sglang.patches.topk._selecting": "whose top-k SGLang's router is computing right now",
    "sere_sglang.patches.guard.HOOKS": "every hook that this process has installed",
    "sere_sglang.patches.guard._launcher": "what failed in the launcher",
    "sere_sglang.patches.engine._confirming": "the launcher waits for schedulers to report SERE",
    "sere_sglang.patches.http_server._tasks": "changes on their way to the schedulers",
    "sere_sglang.patches.request_quality._rules": "what requests of this launcher may ask for",
    "sere_sglang.patches.shadow._shadow": "what is compared with exact routing, in the launcher",
    "sere_sglang.patches.calibration._collector": "of this worker, while it calibrates",
    "sere_sglang.patches.doctor._answer": "of this worker, to doctor's question",
    "sere_sglang.patches.cpu_engine._library": "torch's registration of the sgl_kernel stand-in",
    "sere_sglang.ops.dispatch._ready": "implementations that are built",
    "sere_sglang.ops.dispatch._auto": "what impl=auto chose, by device type",
    "sere_sglang.ops.reroute._library": "torch's registration of the re-routing op",
    "sere_sglang.ops.fused._library": "torch's registration of the fused op",
    "sere_sglang.ops.rule_ops._library": "torch's registration of the rules' ops",
}
"""Every module variable that a running process changes or holds something alive by. Functions under
functools.cache keep what they were asked first, besides."""
