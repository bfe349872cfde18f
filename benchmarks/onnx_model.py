"""A Problem as an ONNX model: a chain of its operators RNN, GRU or LSTM. Needs the package onnx."""

import numpy as np
from onnx import TensorProto, helper, numpy_helper

OPSET, IR_VERSION = 17, 8
# Where ONNX's blocks of gate rows are in torch's: i o f c in i f g o; z r h in r z n.
ORDER = {"rnn": [0], "gru": [1, 0, 2], "lstm": [0, 3, 1, 2]}


def layers(problem):
    """Inputs ``input`` [T, B, I], ``h_0``, of the LSTM ``c_0``, of a ragged case ``lengths``;
    outputs ``output`` [T, B, directions*H], ``h_n`` and of the LSTM ``c_n``."""
    case, cell = problem.case, problem.cell
    states = ["h", "c"] if cell == "lstm" else ["h"]
    nodes, constants = [], []

    def constant(name, array):
        constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def node(operator, inputs, outputs, **attributes):
        nodes.append(helper.make_node(operator, inputs, outputs, **attributes))

    def stacked(kind, layer):
        """A parameter of every direction of a layer, [directions, rows in ONNX's order, ...]."""
        found = []
        for suffix in ("", "_reverse")[: case.directions]:
            weight = problem.weights[f"{kind}_l{layer}{suffix}"].numpy()
            gates = np.split(weight, len(ORDER[cell]))
            found.append(np.concatenate([gates[k] for k in ORDER[cell]]))
        return np.stack(found)

    split = constant("split", np.full(case.layers, case.directions, dtype=np.int64))
    for state in states:
        parts = [f"{state}_0_{layer}" for layer in range(case.layers)]
        node("Split", [f"{state}_0", split], parts, axis=0)
    shape = constant("shape", np.array([0, 0, -1], dtype=np.int64))
    options = {"gru": {"linear_before_reset": 1}}.get(cell, {})
    if case.bidirectional:
        options["direction"] = "bidirectional"
        if cell == "rnn":
            options["activations"] = ["Tanh", "Tanh"]
    x = "input"
    for layer in range(case.layers):
        biases = np.concatenate([stacked("bias_ih", layer), stacked("bias_hh", layer)], axis=1)
        inputs = [
            x,
            constant(f"W_{layer}", stacked("weight_ih", layer)),
            constant(f"R_{layer}", stacked("weight_hh", layer)),
            constant(f"B_{layer}", biases),
            "lengths" if case.ragged else "",
            *[f"{state}_0_{layer}" for state in states],
        ]
        outputs = [f"y_{layer}", *[f"{state}_n_{layer}" for state in states]]
        node(cell.upper(), inputs, outputs, hidden_size=case.hidden, **options)
        x = "output" if layer == case.layers - 1 else f"x_{layer + 1}"
        node("Transpose", [f"y_{layer}"], [f"by_step_{layer}"], perm=[0, 2, 1, 3])
        node("Reshape", [f"by_step_{layer}", shape], [x])
    for state in states:
        parts = [f"{state}_n_{layer}" for layer in range(case.layers)]
        node("Concat", parts, [f"{state}_n"], axis=0)

    def value(name, *size):
        kind = TensorProto.INT32 if name == "lengths" else TensorProto.FLOAT
        return helper.make_tensor_value_info(name, kind, size)

    rows, width = case.layers * case.directions, case.directions * case.hidden
    given = [value("input", case.steps, case.batch, case.inputs)]
    given += [value(f"{state}_0", rows, case.batch, case.hidden) for state in states]
    given += [value("lengths", case.batch)] if case.ragged else []
    wanted = [value("output", case.steps, case.batch, width)]
    wanted += [value(f"{state}_n", rows, case.batch, case.hidden) for state in states]
    graph = helper.make_graph(nodes, "recurrent", given, wanted, constants)
    opset = [helper.make_opsetid("", OPSET)]
    return helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION)
