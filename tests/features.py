"""The rows of docs/features.md: what is asked for, who tests that ours does it, what torch.nn does.

`make features` runs each named test and each probe (torch_nn_probes.py) and writes the table. A new
feature is one line here. ``cudnn`` is what a GPU does where the source in ``SOURCES`` says so.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch_nn_probes as probes

MEASURE = "the measure"
NOT_MEASURED = "not measured"
NOT_COMPARED = "not compared"
SAME = "as on the CPU"  # decided in Python, before any kernel

SOURCES = {
    "a": "pytorch/pytorch#5261: `_cudnn_rnn_backward` has no derivative",
    "b": 'pytorch/pytorch#10006: "cudnn RNN backward can only be called in training mode"',
    "c": "the notes on cuDNN in the documentation of `torch.nn.LSTM`",
    "d": "NVIDIA, cuDNN API reference, `cudnnRNNMode_t`: RELU, TANH, LSTM and GRU (reset after)",
}


class Feature(NamedTuple):
    """One row. ``tests`` holds node ids below tests/; ``ours`` is what they show, if not "yes"."""

    name: str
    tests: tuple[str, ...]
    torch_nn: Callable | str
    cudnn: str = NOT_MEASURED
    ours: str = "yes"


def row(name, tests, torch_nn, cudnn=NOT_MEASURED, ours="yes"):
    return Feature(name, tuple(tests.split()), torch_nn, cudnn, ours)


# fmt: off
FEATURES = {
    "In torch.nn's place": [
        row("the results and gradients of torch.nn", "test_modules.py::test_results_and_gradients_are_those_of_torch test_cells.py::test_results_and_gradients_are_those_of_torch", MEASURE, NOT_COMPARED),
        row("its parameters, state_dict and repr", "test_modules.py::test_parameters_state_dict_and_repr_are_those_of_torch", MEASURE, NOT_COMPARED),
        row("its errors for wrong arguments and input", "test_errors.py::test_constructors_fail_as_those_of_torch test_errors.py::test_calls_fail_as_those_of_torch", MEASURE, NOT_COMPARED),
        row("its dropout masks from the same seed", "test_modules.py::test_dropout_draws_the_masks_of_torch", MEASURE, NOT_COMPARED),
        row("torch's own database of module tests", "test_torch_database.py", MEASURE, NOT_COMPARED),
        row("swapped into a model that exists, and back", "test_swap.py::test_accelerate_and_restore_a_model test_swap.py::test_an_optimizer_made_before_goes_on_training", MEASURE, NOT_COMPARED),
        row("errors bounded by torch.nn's, against float64", "test_layer.py::test_layer_is_as_exact_as_torch", MEASURE, NOT_COMPARED),
    ],
    "Gradients": [
        row("double backward", "test_derivatives.py::test_gradients_of_gradients_of_layers test_derivatives.py::test_gradients_of_gradients_of_cells", probes.double_backward, "no [a]", "yes, in torch operations"),
        row("third derivatives", "test_derivatives.py::test_third_derivatives", probes.third_derivative, "no [a]", "yes, in torch operations"),
        row("backward in eval mode", "test_torch_database.py::test_forward_and_gradients", probes.eval_backward, "no [b]"),
        row("backward twice over one graph", "test_layer.py::test_a_second_backward_is_right", probes.second_backward),
        row("forward mode (`torch.func.jvp`)", "test_derivatives.py::test_forward_mode", probes.forward_mode, ours="yes, in torch operations"),
        row("per-sample gradients (`vmap(grad(...))`)", "test_transforms.py::test_gradients_of_each_sample", probes.per_sample_gradients),
        row("vmap over input, states and weights", "test_transforms.py::test_vmap_is_a_loop test_transforms.py::test_nested_vmap_and_ensembles", probes.vmap_input),
        row("batched gradients (`is_grads_batched`)", "test_derivatives.py::test_batched_gradients_of_autograd", probes.batched_gradients),
        row("no gradients where none are wanted; inference mode", "test_modules.py::test_no_gradients_where_none_are_wanted", probes.inference_mode),
    ],
    "Compilers": [
        row("torch.compile without a graph break", "test_compile.py::test_layers_compile_without_a_graph_break test_compile.py::test_cells_compile_without_a_graph_break", probes.compiled, SAME),
        row("torch.compile of PackedSequence without a graph break", "test_compile.py::test_packed_sequences_compile_without_a_graph_break", probes.compiled_packed, SAME),
        row("torch.export, any batch and length", "test_export.py::test_export_with_dynamic_steps_and_batch", probes.exported),
        row("AOTInductor", "test_export.py::test_aot_inductor_runs_what_was_exported", probes.aot_inductor),
        row("ONNX: the standard nodes", "test_onnx.py::test_layers_are_the_nodes_of_onnx test_onnx.py::test_batch_and_steps_may_change", probes.onnx_nodes),
        row("operators that pass torch.library.opcheck", "test_export.py::test_layer_passes_the_checks_of_torch test_export.py::test_operators_behind_it_pass_the_checks_of_torch", "torch's own operators"),
        row("torch.fx: layers are leaves", "test_scripting.py::test_fx_gives_the_graph_of_torch_nn", probes.fx, SAME),
        row("torch.jit.trace", "test_scripting.py::test_trace", probes.traced, ours="yes, as torch.nn's operators, with a warning"),
        row("torch.jit.script", "test_scripting.py::test_script test_scripting.py::test_script_refuses_what_torch_nn_has_not", probes.scripted, ours="yes, as torch.nn's layer, with a warning; not what torch.nn has not"),
    ],
    "Numbers": [
        row("float64", "test_modules.py::test_other_dtypes test_layer.py::test_variants_are_as_exact_as_torch", probes.float64),
        row("bfloat16", "test_modules.py::test_other_dtypes test_layer.py::test_long_sums_of_bfloat16", probes.bfloat16),
        row("float16 on the CPU", "test_backends.py::test_float16_is_served_by_torch_nn_with_one_warning", probes.float16, "on the GPU: yes [c]", "through torch.nn, with a warning"),
        row("autocast to bfloat16 on the CPU", "test_backends.py::test_autocast_gives_the_dtypes_of_torch", probes.autocast),
        row("GradScaler", "test_autocast.py::test_grad_scaler_on_the_cpu", probes.grad_scaler),
        row("NaN and infinity come through", "test_layer.py::test_nan_and_infinity_come_through", probes.nan_comes_through),
        row("the same bits every time", "test_cpu.py::test_same_bits_every_time", probes.same_bits, "not with every version, unless `CUBLAS_WORKSPACE_CONFIG` is set [c]"),
        row("`torch.use_deterministic_algorithms(True)`", "test_determinism.py::test_use_deterministic_algorithms", probes.deterministic_algorithms),
        row("both directions at once: the bits of one thread", "test_cpu.py::test_side_by_side_gives_the_bits_of_one_thread", probes.any_threads),
        row("weights in int8 or bfloat16", "test_quantization.py::test_exact_for_the_stored_weights test_quantization.py::test_close_to_the_float_weights", probes.quantized),
    ],
    "Input": [
        row("PackedSequence", "test_modules.py::test_results_and_gradients_are_those_of_torch", probes.packed, "yes, but not with its persistent kernels [c]"),
        row("`lengths=` in any order, without packing", "test_extras.py::test_lengths_are_packing_and_padding test_extras.py::test_lengths_at_the_edges", probes.lengths, SAME),
        row("`resets=`: episodes that begin inside a sequence", "test_resets.py::test_a_loop_over_cells_does_the_same test_resets.py::test_episodes_do_not_see_each_other test_resets_kernels.py::test_kernels_follow_the_reference", "no: a Python loop over its cells", SAME),
        row("views of any strides", "test_modules.py::test_views_in_memory", probes.strided),
        row("an empty batch", "test_modules.py::test_empty_batches", probes.empty_batch),
    ],
    "Cells and options": [
        row("a fused kernel for RNN, LSTM and GRU on the CPU", "test_backends.py::test_explain_says_what_runs_and_why", probes.fused, "on the GPU: yes [c]"),
        row("sigmoid RNN", "test_extras.py::test_other_cells_follow_the_reference", probes.sigmoid, "no [d]"),
        row("the original GRU, reset before the product", "test_extras.py::test_other_cells_follow_the_reference", probes.original_gru, "no [d]"),
        row("LSTM with projection", "test_layer.py::test_gradcheck test_extras.py::test_every_cell_state", probes.projection),
        row("output feedback (`JordanRNN`): teacher forcing, free running, scheduled sampling", "test_jordan.py::test_outputs_and_gradients_follow_the_reference test_jordan.py::test_what_has_a_kernel_is_not_composed", "no: a Python loop", NOT_MEASURED),
        row("every cell state, with gradients", "test_extras.py::test_every_cell_state test_extras.py::test_gradients_through_the_cell_states", probes.all_cell_states, SAME),
        row("orthogonal or identity recurrent weights", "test_extras.py::test_recurrent_init", probes.recurrent_init, SAME),
        row("forget gate bias", "test_extras.py::test_forget_bias_in_every_layer_and_direction", probes.forget_bias, SAME),
        row("residual links, a width for each layer, one bias, learned initial states", "test_options.py::test_options_follow_the_reference test_options.py::test_a_width_for_each_layer test_options_resets.py::test_kernels_serve_every_option", "no: layers of one width in a Python loop", SAME),
        row("weight dropout (DropConnect) and one dropout mask per sequence", "test_options.py::test_options_follow_the_reference test_options.py::test_every_way_to_give_a_batch_has_the_same_masks test_random.py", "no: a mask of the user's own", SAME),
        row("zoneout", "test_zoneout.py::test_kernels_follow_the_reference test_options.py::test_options_follow_the_reference test_cuda_zoneout.py::test_kernels_follow_the_reference test_normalized_zoneout.py::test_layers_follow_the_reference", "no: a Python loop over its cells", SAME),
        row("layer normalisation", "test_normalized_layers.py::test_stacks_of_both_directions_follow_the_reference test_normalized_kernels.py::test_layer_is_as_exact_as_a_loop_of_torch", "no: a Python loop of torch operations", SAME),
        row("peephole LSTM", "test_normalized_layers.py::test_a_loop_of_torch_operations_does_the_same test_normalized_kernels.py::test_layer_is_as_exact_as_a_loop_of_torch", "no: a Python loop of torch operations", SAME),
        row("what every gate let through (`return_gates=True`)", "test_options.py::test_gates test_options_resets.py::test_gates_know_of_resets test_normalized_layers.py::test_gates", "no: cuDNN and oneDNN keep them to themselves", SAME),
        row("weights from and to Keras, from ONNX and haste", "test_converters.py", "no", SAME),
        row("memory of training that grows with T / k + k (`checkpoint_every=k`)", "test_memory_modes.py::test_checkpoints_keep_every_bit test_memory_modes.py::test_memory_grows_with_the_number_of_checkpoints test_normalized_control.py::test_checkpoints_keep_every_bit", probes.checkpoint_every, SAME),
        row("the gradient clipped at every step (`grad_clip`)", "test_gradient_control.py::test_clipped_gradients_follow_the_reference test_normalized_control.py::test_clipped_gradients_follow_the_reference", probes.grad_clip, SAME),
        row("the gradient's norm at every step (`gradient_flow`)", "test_gradient_control.py::test_gradient_flow_is_that_of_a_loop test_normalized_control.py::test_gradient_flow_follows_the_reference", "no: hooks see the output, not dL/dh_t", SAME),
        row("real-time recurrent learning (`online.RTRL`)", "test_rtrl.py::test_gradients_are_those_of_bptt test_rtrl.py::test_memory_does_not_grow_with_the_stream", "no: backpropagation alone", SAME),
        row("tokens of a language model, sampled in one call (`generate`)", "test_generation.py::test_tokens_are_those_of_the_usual_loop_over_torch_nn test_generation.py::test_a_sequence_ends_at_eos", "no: a Python loop", SAME),
        row("beam search, and encoder-decoders (`encode`, `decode`)", "test_generation_choice.py::test_beam_search_is_that_of_the_reference test_generation.py::test_encoder_and_decoder", "no: a Python loop", SAME),
        row("truncated BPTT over a stream (`online.tbptt`)", "test_tbptt.py::test_one_window_is_full_bptt test_tbptt.py::test_windows_are_bptt_from_a_detached_state", "no: a Python loop", SAME),
        row("which kernel would run, and why", "test_backends.py::test_explain_says_what_runs_and_why", "no: nothing to ask", SAME),
    ],
    "Modules": [
        row("pickle, torch.save, deepcopy", "test_modules.py::test_copies test_cells.py::test_parameters_repr_and_copies", probes.pickled, SAME),
        row("checkpoints of torch before 1.8", "test_modules.py::test_setstate_of_old_checkpoints", MEASURE, SAME),
        row("parametrized weights (weight_norm)", "test_parametrizations.py::test_changed_weights", probes.parametrized, SAME),
        row("tied and shared weights", "test_parametrizations.py::test_tied_between_layers_and_directions test_parametrizations.py::test_shared_between_modules", probes.tied, SAME),
        row("weight dropping: tensors in place of parameters", "test_parametrizations.py::test_weight_drop", probes.weight_drop, SAME),
        row("moving average of weights (`AveragedModel`)", "test_parametrizations.py::test_moving_average_of_weights", probes.averaged, SAME),
        row("weights given by functional_call", "test_parametrizations.py::test_functional_call_has_gradients_for_what_it_is_given", probes.functional_call, SAME),
        row("meta device", "test_modules.py::test_conversions_and_factories test_checkpoints.py::test_deferred_initialization", probes.meta, SAME),
        row("`torch.nn.utils.skip_init`", "test_checkpoints.py::test_deferred_initialization", probes.skip_init, SAME),
        row("whole modules by torch.load with weights_only", "test_checkpoints.py::test_whole_modules_load_with_weights_only", probes.weights_only, SAME),
        row("frozen weights, hooks, subclasses", "test_modules.py::test_subclasses_hooks_and_frozen_weights", probes.frozen, SAME),
        row("many Python threads at once", "test_cpu.py::test_many_python_threads_at_once test_cpu.py::test_other_threads_run_while_a_kernel_does", probes.threads),
        row("forked and spawned workers", "test_concurrency.py::test_processes", NOT_MEASURED),
        row("DistributedDataParallel, FSDP2, distributed checkpoints: two processes equal one", "test_distributed.py::test_two_processes_are_one", MEASURE),
        row("10,000 calls leave nothing behind", "test_concurrency.py::test_many_calls_leave_nothing_behind", NOT_MEASURED),
        row("calls typed: PackedSequence in, PackedSequence out", "test_typing.py", probes.typed_calls, SAME),
    ],
}

# What torch.nn has and we have not; no test can show an absence.
MISSING = [
    ("wheels to install: no compiler needed", "compiled where it is installed, about a minute"),
    ("macOS, Windows", "Linux"),
    ("other devices (MPS, XPU, ROCm)", "torch.nn's own kernels serve, with a warning"),
    ("a GPU's speed, measured for years", "CUDA kernels that have not run on a GPU yet (README)"),
    ("`isinstance(layer, torch.nn.LSTM)`", "`torch.nn.RNNBase`, unless the class is assigned"),
    ("TorchScript keeps the layer's own kernel", "torch.nn's serves, with a warning"),
    ("`torch.ao.quantization`", "`rnn_ext.quantize_weights`; cells are not quantized"),
]
# fmt: on
