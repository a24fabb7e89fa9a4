"""What is expected of each of torch's tests of its DistributedDataParallel.

A name is that of a method of torch's `DistributedTest._DistTestBase`, or `Class.method` of its
tests of DDP with RPC. Every test in the first two tables passes with torch's own class under the
same conditions, on the CPU with gloo; those that do not are in the third.
"""

from __future__ import annotations

from typing import NamedTuple


class Different(NamedTuple):
    """A test that fails with our class, and must fail in this way."""

    why: str
    error: str
    """A regular expression that the failure's text matches."""


PASSES = (
    "DdpComparisonTest.test_ddp_comparison_uneven_inputs",
    "DdpComparisonTest.test_ddp_dist_autograd_local_vs_remote",
    "DdpComparisonTest.test_ddp_dist_autograd_sparse_grads",
    "DdpUnderDistAutogradTest.test_backward_ddp_inside",
    "DdpUnderDistAutogradTest.test_backward_ddp_outside",
    "DdpUnderDistAutogradTest.test_backward_ddp_outside_uneven_inputs",
    "test_DistributedDataParallelCPU",
    "test_DistributedDataParallelCPU_grad_is_view",
    "test_DistributedDataParallel_SyncBatchNorm",
    "test_DistributedDataParallel_SyncBatchNorm_2D_Input",
    "test_DistributedDataParallel_SyncBatchNorm_Channels_Last",
    "test_DistributedDataParallel_SyncBatchNorm_Diff_Input_Sizes_Running_Value",
    "test_DistributedDataParallel_SyncBatchNorm_Diff_Input_Sizes_gradient",
    "test_DistributedDataParallel_SyncBatchNorm_No_Affine",
    "test_DistributedDataParallel_SyncBatchNorm_Single_Input_Per_Process",
    "test_DistributedDataParallel_non_default_stream",
    "test_DistributedDataParallel_requires_grad",
    "test_DistributedDataParallel_with_amp_and_grad_is_view",
    "test_accumulate_gradients_no_sync",
    "test_accumulate_gradients_no_sync_allreduce_hook",
    "test_accumulate_gradients_no_sync_allreduce_with_then_hook",
    "test_accumulate_gradients_no_sync_grad_is_view",
    "test_ddp_apply_optim_in_backward",
    "test_ddp_apply_optim_in_backward_grad_as_bucket_view_false",
    "test_ddp_apply_optim_in_backward_ignored_params",
    "test_ddp_broadcast_buffer",
    "test_ddp_broadcast_buffer_via_hook",
    "test_ddp_broadcast_buffers_deprecation_warning",
    "test_ddp_bucket_cap_mb_list",
    "test_ddp_buffer_hook_allreduce",
    "test_ddp_buffer_hook_allreduce_return_future",
    "test_ddp_build_debug_param_to_name_mapping",
    "test_ddp_build_debug_param_to_name_mapping_requires_grad",
    "test_ddp_comm_hook_logging",
    "test_ddp_compile_static_graph",
    "test_ddp_create_graph",
    "test_ddp_device_mesh_initialization",
    "test_ddp_forward_backward_hook",
    "test_ddp_grad_div_uneven_inputs",
    "test_ddp_hook_parity_allreduce",
    "test_ddp_hook_parity_allreduce_process_group",
    "test_ddp_hook_parity_powerSGD",
    "test_ddp_ignore_params_arg",
    "test_ddp_inference",
    "test_ddp_init_sync_buffers_with_forward_sync_buffers_false",
    "test_ddp_join_model_equivalence",
    "test_ddp_join_respects_forward_sync_buffers_false",
    "test_ddp_logging_data_cpu",
    "test_ddp_model_diff_num_params_across_ranks",
    "test_ddp_model_diff_shape_across_ranks",
    "test_ddp_namedtuple",
    "test_ddp_native_mixed_precision_grad_as_bucket_view_no_set_grad_none",
    "test_ddp_native_mixed_precision_grad_as_bucket_view_set_grad_to_none",
    "test_ddp_native_mixed_precision_ignored_params",
    "test_ddp_native_mixed_precision_no_grad_as_bucket_view_no_set_grad_none",
    "test_ddp_native_mixed_precision_no_grad_as_bucket_view_set_grad_to_none",
    "test_ddp_new_tensor_in_fwd",
    "test_ddp_new_tensor_in_fwd_static_graph",
    "test_ddp_python_error_logged",
    "test_ddp_remove_autograd_hooks",
    "test_ddp_returns_tensor_with_no_grad",
    "test_ddp_shared_grad_acc_unused_params",
    "test_ddp_sink_noclone",
    "test_ddp_static_graph_nested_types",
    "test_ddp_sync_module_states",
    "test_ddp_uneven_input_exception",
    "test_ddp_uneven_input_join_disable",
    "test_ddp_uneven_inputs_stop_iteration_sync_bn",
    "test_ddp_zero_output_features",
    "test_detect_ddp_is_actually_static",
    "test_get_data_parallel_params",
    "test_grads_same_across_ranks_with_no_sync",
    "test_output_unused_in_loss_dict_module",
    "test_output_unused_in_loss_tuple_module",
    "test_post_localSGD_optimizer_parity",
    "test_post_localSGD_optimizer_parity_grad_is_view",
    "test_post_localSGD_optimizer_parity_with_hierarchical_sgd",
    "test_post_localSGD_optimizer_parity_with_hierarchical_sgd_grad_is_view",
    "test_post_localSGD_optimizer_step_reload",
    "test_stateless_api_with_ddp",
    "test_static_graph_multi_forward",
    "test_sync_bn_logged",
    "test_undefined_grad_parity_unused_parameters",
)

_NO_ERROR = "an unused parameter is right by design, where torch demands a flag and raises"

DIFFERENT = {
    # By design.
    "test_compute_bucket_assignment_by_size_sparse_error_with_logger": Different(
        "the logger is no object of torch's, to which torch's own C++ functions could write",
        "incompatible function arguments",
    ),
    "test_ddp_control_flow_different_across_ranks": Different(_NO_ERROR, "DDP error not raised"),
    "test_ddp_control_flow_same_across_ranks": Different(_NO_ERROR, "DDP error not raised"),
    "test_ddp_multiple_nested_unused_params_err_ignore_params": Different(
        _NO_ERROR, "Expected error was not raised"
    ),
    "test_ddp_multiple_nested_unused_params_error": Different(
        _NO_ERROR, "Expected error was not raised"
    ),
    "test_ddp_profiling_autograd_profiler": Different(
        "profiled collectives are called shm:all_reduce", r"assertEqual\(event_count, num_iters\)"
    ),
    "test_ddp_profiling_torch_profiler": Different(
        "profiled collectives are called shm:all_reduce", r"assertEqual\(event_count, num_iters\)"
    ),
    "test_ddp_unused_params_rebuild_buckets_exception": Different(
        _NO_ERROR, "DDP unused parameters error not raised"
    ),
    "test_different_graph_across_ranks": Different(
        "buckets are planned anew also with find_unused_parameters, and the logging data says so",
        "AssertionError: 1 is not false",
    ),
    "test_invalid_static_graph": Different(
        "static_graph is no promise that could be broken", "RuntimeError not raised"
    ),
    "test_skip_all_reduce_unused_parameters": Different(
        "every bucket is reduced, so that ranks need not agree on which ones",
        "Expected 1 but got 2",
    ),
    "test_static_graph_api_cpu": Different(
        "_set_static_graph has nothing to set and may be called at any time",
        "RuntimeError not raised",
    ),
    "test_ddp_sync_bn_training_vs_eval": Different(
        "a backward of `.module`, and on one rank only, is averaged too (torch: if it began in the"
        " wrapper's forward); it is to be under no_sync()",
        "DistBackendError|closed by peer",
    ),
}

NOT_RUN = {
    "CudaDdpComparisonTest.test_ddp_dist_autograd_local_vs_remote_gpu": "the same on the CPU as"
    " DdpComparisonTest.test_ddp_dist_autograd_local_vs_remote",
    "DdpComparisonTest.test_ddp_comparison": "fails now and then with torch's own class (a hang)",
    "DdpUnderDistAutogradTest.test_backward_no_ddp": "has no DDP in it",
    "test_DistributedDataParallel": "fails with torch's own class (passes with ours)",
    "test_DistributedDataParallel_SyncBatchNorm_half": "makes a device of a number",
    "test_compute_bucket_assignment_by_size_sparse_error_without_logger": "of another function",
    "test_ddp_device": "asks tensors for the number of their GPU",
    "test_ddp_has_finalized": "fails with torch's own class",
    "test_ddp_hook_parity_post_localSGD": "counts GPUs to make subgroups",
    "test_ddp_hook_pickling_powerSGD": "fails with torch's own class: torch.load refuses",
    "test_ddp_logging_data_gpu": "asks for the number of the GPU",
    "test_ddp_profiling_execution_trace": "needs NCCL",
    "test_ddp_uneven_inputs": "minutes of large models on a CPU",
    "test_verify_model_across_rank_with_logger": "of another function",
    "test_verify_model_across_rank_without_logger": "of another function",
}

TORCH = "2.13"
"""The tables are complete for this version."""


def world_size(name: str) -> int:
    """Returns how many ranks a test is written for."""
    if "." in name:  # with RPC; four trainers, and a master and a parameter server
        return 6 if name.startswith("DdpUnderDistAutogradTest") else 4
    return 4 if "hierarchical" in name else 2
