"""The exchange of TensorFlow gradients, traced into the graph or eager."""
