"""Files of count matrices, format by format, behind one protocol of readers."""
