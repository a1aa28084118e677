"""A server under mixed traffic for minutes or hours, its answers held against the oracle.

- `traffic`: what clients ask, and where its marks lie, by the model's tokenizer alone;
- `adapter`: a LoRA adapter, for the server and for the oracle;
- `client`: sends it at changing rates, and counts what comes back;
- `judge`: holds sampled answers against the oracle on transformers;
- `watch`: memory, open files and vLLM's own counters of the server's processes, over time;
- `report`: the verdict, the JSON and the chart.
"""
