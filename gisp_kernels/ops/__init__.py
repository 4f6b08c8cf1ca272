"""Ops on tensors: public function, plain torch reference and dispatch in one file each."""
