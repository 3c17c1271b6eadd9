"""Models from ONNX and to ONNX.

api             from_onnx and to_onnx
model_file      ONNX files, read without trusting them
program         compiles a graph to nodes that run
graph_model     runs a compiled graph
final_states    finds the outputs of a graph that are final states
ops             the operators, on any array library
reader          recognises a graph that is a model of xprnn
writer          writes a model as a graph
layer_specs     a network as a list of layers, between reader, writer and models
"""
