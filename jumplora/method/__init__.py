"The gate, the layer, the schedule, the regularizers and the PEFT adapter."
