"""The path of rows to the model: streams, checks of first rows, the collator and the copy to the device."""
