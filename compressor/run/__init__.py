"""A pipeline carried out: what each step computes, what the store holds, what is reported."""
