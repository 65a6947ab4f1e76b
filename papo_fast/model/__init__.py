"""The vision-language model as a policy: loading, packing, attention, adapters."""
