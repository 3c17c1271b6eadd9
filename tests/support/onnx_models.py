"""Models that the ONNX operators RNN, LSTM and GRU can express: every kind of layer, with other layers around it."""

import xprnn
from xprnn import cells

CUSTOM_LSTM = cells.lstm("hardsigmoid", xprnn.activation("scaledtanh", 1.5, 0.7), "softsign", peepholes=True, clip=0.7)

OPERATOR_MODELS = {
    "rnn": xprnn.RNN(3, 4),
    "relu": xprnn.RNN(3, 4, 2, nonlinearity="relu", bidirectional=True),
    "identity": xprnn.RNN(3, 4, nonlinearity="identity", reverse=True),
    "elu": xprnn.RNN(3, 4, nonlinearity=xprnn.activation("elu", 0.5), learned_state=True),
    "clipped": xprnn.RNN(3, 4, cell=cells.elman("leakyrelu", clip=0.3)),
    "one unit": xprnn.RNN(3, 1, 2),
    "one unit, bidirectional": xprnn.GRU(3, 1, 2, bidirectional=True, batch_first=True),
    "lstm": xprnn.LSTM(3, 4, 3),
    "lstm, bidirectional": xprnn.LSTM(3, 4, 2, bidirectional=True, batch_first=True, learned_state=True),
    "lstm, reverse": xprnn.LSTM(3, 4, 2, reverse=True, bias=False),
    "lstm of two hidden sizes": xprnn.LSTM(3, (4, 6), 2, learned_state=True, bidirectional=True),
    "lstm with other activations": xprnn.LSTM(3, 4, cell=CUSTOM_LSTM, bidirectional=True),
    "lstm, coupled": xprnn.LSTM(3, 4, 2, cell=cells.lstm(coupled=True)),
    "gru": xprnn.GRU(3, 4, 2, learned_state=True),
    "gru, reset before": xprnn.GRU(3, 4, bidirectional=True, reset_after=False, batch_first=True),
    "gru with other activations": xprnn.GRU(3, 4, cell=cells.gru_reset_before("hardsigmoid", clip=0.6)),
    "with linear": xprnn.Sequential(rnn=xprnn.GRU(3, 4, dropout=0.5, num_layers=2), head=xprnn.Linear(4, 2)),
    "last step": xprnn.Sequential(
        rnn=xprnn.GRU(3, 4, 2, batch_first=True),
        last=xprnn.LastStep(batch_first=True),
        head=xprnn.Linear(4, 2),
        bend=xprnn.ActivationLayer("relu"),
        odds=xprnn.Softmax(log=True),
    ),
    "last step, reverse": xprnn.Sequential(
        rnn=xprnn.LSTM(3, 4, 2, reverse=True), last=xprnn.LastStep(direction="reverse"), head=xprnn.Linear(4, 2)
    ),
    "last step, both directions": xprnn.Sequential(
        rnn=xprnn.LSTM(3, 4, 2, bidirectional=True, batch_first=True),
        last=xprnn.LastStep(batch_first=True, direction="both"),
        head=xprnn.Linear(8, 2),
        odds=xprnn.Softmax(),
    ),
    "merged directions": xprnn.Sequential(
        a=xprnn.GRU(3, 4, bidirectional=True),
        b=xprnn.MergeDirections(4, "ave"),
        c=xprnn.RNN(4, 5, bidirectional=True),
        d=xprnn.MergeDirections(5, "mul"),
        e=xprnn.LSTM(5, 2, bidirectional=True),
        last=xprnn.LastStep(direction="both"),
        f=xprnn.MergeDirections(2, "sum"),
    ),
    "multiplied directions": xprnn.Sequential(
        rnn=xprnn.LSTM(3, 4, bidirectional=True, batch_first=True),
        both=xprnn.MergeDirections(4, "mul"),
        head=xprnn.Linear(4, 2),
    ),
    "with activations": xprnn.Sequential(
        a=xprnn.LSTM(3, 4),
        b=xprnn.ActivationLayer(xprnn.activation("elu", 0.3)),
        c=xprnn.LSTM(4, 4),
        d=xprnn.ActivationLayer("tanh"),
        e=xprnn.Softmax(),
    ),
    "several recurrent layers": xprnn.Sequential(
        ids=xprnn.Embedding(7, 3),
        up=xprnn.LSTM(3, 4, 2),
        on=xprnn.LSTM(4, 4),
        last=xprnn.GRU(4, 5, bias=False),
        head=xprnn.Linear(5, 4),
        end=xprnn.Linear(4, 2, bias=False),
    ),
}
