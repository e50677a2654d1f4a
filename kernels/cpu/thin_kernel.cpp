// Number: bfloat16 as uint16_t, Half or float.
// operation 0: out [m, rank] = scale * x [m, k] tᵀ of t [rank, k], of any two steps.
// operation 1: out [rank, k], of any two steps, = tᵀ x of t [m, rank].
// operation 2: x [m, k] += out [m, rank] t of t [rank, k], of any two steps.
extern "C" void kernel(int64_t operation, uint16_t* rows, int64_t ldx, int64_t m, int64_t k,
                       const float* t, int64_t rank, int64_t step, int64_t step_k, float* out,
                       int64_t step_out, int64_t step_out_k, float scale, int64_t threads) {
  Number* const x = reinterpret_cast<Number*>(rows);
  if (operation == 0)
    product(x, ldx, m, k, t, rank, step, step_k, out, step_out, scale, threads);
  else if (operation == 1)
    gradient(x, ldx, m, k, t, step, rank, out, step_out, step_out_k, threads);
  else
    add(x, ldx, m, k, out, step_out, rank, t, step, step_k, threads);
}
