"""An Auto under fit: chosen before the graph is traced, by rank 0's numbers."""

import keras_common as common
import pytest
from keras_common import fit, model

import hvd_accordion.tensorflow.keras as hvd
from hvd_accordion import Accordion, Auto, Dense, PowerSGD, TopK
from hvd_accordion.auto import Measured
from hvd_accordion.cost import Link
from hvd_accordion.tensorflow import engine

AUTO = Auto((PowerSGD(2), TopK(0.02)))
