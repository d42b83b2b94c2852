"""Which layer gets which compression, and when: Accordion, Auto, the batch size, layers, groups, the cost model."""
