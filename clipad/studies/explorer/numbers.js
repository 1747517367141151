// The numbers of the image widget: from what widget.py sends to maps. A test holds them to clipad's own.

const bytes = (view) => new Uint8Array(view.buffer, view.byteOffset, view.byteLength);
const copied = (view) => bytes(view).slice().buffer; // typed arrays need aligned memory

export const float32 = (view) => new Float32Array(copied(view));

// All lower bytes, then all upper ones.
export function float16(view) {
  const all = bytes(view), half = all.length / 2;
  return Float32Array.from({ length: half }, (_, i) => {
    const h = all[i] | (all[half + i] << 8);
    const sign = h & 0x8000 ? -1 : 1, exponent = (h >> 10) & 31, fraction = h & 1023;
    return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
  });
}

export const steps16 = (view, low, step) =>
  Float32Array.from(new Uint16Array(copied(view)), (q) => low + q * step);

// Stage cosines J x T x 2 from `start` on -> patch values N, summed over the chosen stages (surgery.py).
export function patchValues(z, tokens, chosen, surgery, start = 0) {
  const found = new Float32Array(tokens - 1);
  for (const stage of chosen) {
    const at = start + 2 * tokens * stage;
    const p = 1 / (1 + Math.exp(z[at] - z[at + 1])); // softmax of the class token's cosines, anomalous
    for (let i = 1; i < tokens; i++) {
      const normal = z[at + 2 * i], anomalous = z[at + 2 * i + 1];
      found[i - 1] += surgery ? p * anomalous - (1 - p) * normal : anomalous;
    }
  }
  return found;
}

// Rows of the S x G matrix "bilinear interpolation to S, then a Gaussian" (SciPy's: reflect, truncate 4).
export function matrix(grid, size, sigma) {
  const bilinear = Array.from({ length: size }, (_, i) => {
    const row = new Float64Array(grid);
    const place = Math.max(0, ((i + 0.5) * grid) / size - 0.5);
    const first = Math.min(Math.floor(place), grid - 1), second = Math.min(first + 1, grid - 1);
    row[first] += 1 - (place - first);
    row[second] += place - first;
    return row;
  });
  const radius = Math.floor(4 * sigma + 0.5);
  const weights = Array.from({ length: 2 * radius + 1 }, (_, k) =>
    radius ? Math.exp(-0.5 * ((k - radius) / sigma) ** 2) : 1);
  const sum = weights.reduce((a, b) => a + b);
  return bilinear.map((_, i) => {
    const row = new Float64Array(grid);
    weights.forEach((weight, k) => {
      let j = (((i + k - radius) % (2 * size)) + 2 * size) % (2 * size);
      if (j >= size) j = 2 * size - 1 - j;
      for (let g = 0; g < grid; g++) row[g] += (weight / sum) * bilinear[j][g];
    });
    let first = 0, end = grid; // only the part that is not zero
    while (first < grid - 1 && row[first] === 0) first++;
    while (end > first + 1 && row[end - 1] === 0) end--;
    return { first, weights: row.slice(first, end) };
  });
}

// M V M^T for V of G x G.
export function upsample(values, m) {
  const size = m.length, grid = Math.round(Math.sqrt(values.length));
  const half = new Float32Array(size * grid), found = new Float32Array(size * size);
  for (let i = 0; i < size; i++) {
    const { first, weights } = m[i];
    for (let k = 0; k < weights.length; k++)
      for (let g = 0; g < grid; g++) half[i * grid + g] += weights[k] * values[(first + k) * grid + g];
  }
  for (let i = 0; i < size; i++)
    for (let j = 0; j < size; j++) {
      const { first, weights } = m[j];
      let sum = 0;
      for (let k = 0; k < weights.length; k++) sum += weights[k] * half[i * grid + first + k];
      found[i * size + j] = sum;
    }
  return found;
}

export function quantile(sorted, q) {
  const place = q * (sorted.length - 1), low = Math.floor(place);
  return sorted[low] + (place - low) * ((sorted[low + 1] ?? sorted[low]) - sorted[low]);
}

// The map of one side, the maxima of the flawless images' maps, and the ends of the colour scale.
export function computeMap(setup, answer, side) {
  const { size, grid, stages } = setup, tokens = grid * grid + 1;
  const references = steps16(answer.references, answer.low, answer.step);
  const each = references.length / answer.count;
  const cosines = float32(answer.z);
  const chosen = answer.detector === "sdp" ? side.stages.map((b) => stages.indexOf(b)) : [0];
  const smoothing = answer.detector === "winclip" ? 0 : side.smoothing;
  const m = matrix(answer.maps ? size : grid, size, smoothing);
  const one = (z, start) => upsample(
    answer.maps ? z.subarray(start, start + each) : patchValues(z, tokens, chosen, side.surgery, start), m);
  const map = one(answer.maps ? float32(answer.maps) : cosines, 0);
  const flawless = Array.from({ length: answer.count }, (_, r) => one(references, r * each));
  const maxima = Float32Array.from(flawless, (f) => f.reduce((a, b) => Math.max(a, b))).sort();
  const all = new Float32Array(size * size * answer.count);
  flawless.forEach((f, r) => all.set(f, r * size * size));
  const low = quantile(all.sort(), 0.5), top = maxima[maxima.length - 1];
  const maximum = map.reduce((a, b) => Math.max(a, b));
  return { map, maxima, maximum, low, high: Math.max(2 * top - low, low + 1e-6), cosines };
}
