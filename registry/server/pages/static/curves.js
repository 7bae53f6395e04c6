// Curves over steps with uPlot: zoom by dragging, values at the cursor, the best point, and where something was shipped.
"use strict";
(() => {
  const colours = ["--s0", "--s1", "--s2", "--s3", "--s4", "--s5", "--s6", "--s7"];
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const short = (value) => (value == null ? "–" : Number(value.toPrecision(5)).toString());

  // One row of values for each curve, over the steps of all.
  const joined = (curves) => uPlot.join(curves.map((curve) => [curve.x, curve.y]));
  const refsOf = (curves) => curves.map((curve) => new Map(curve.x.map((x, at) => [x, curve.refs[at]])));

  // Steps that several curves share may be repeated within one (a run that went on twice): the last counts.
  const unique = (curve) => {
    const last = new Map(curve.x.map((x, at) => [x, at]));
    if (last.size === curve.x.length) return curve;
    const kept = [...last.entries()].sort((one, other) => one[0] - other[0]).map(([, at]) => at);
    return { ...curve, x: kept.map((at) => curve.x[at]), y: kept.map((at) => curve.y[at]), refs: kept.map((at) => curve.refs[at]) };
  };

  const marks = (data) => (plot) => {
    const { ctx, bbox } = plot, ratio = devicePixelRatio;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left - 8 * ratio, bbox.top - 18 * ratio, bbox.width + 16 * ratio, bbox.height + 18 * ratio);  // with room for a best point at an edge
    ctx.clip();
    ctx.font = `${11 * ratio}px ${style("--sans")}`;
    ctx.textBaseline = "top"; ctx.textAlign = "left";
    const taken = [];
    for (const mark of data.marks) {
      const x = Math.round(plot.valToPos(mark.x, "x", true));
      if (x < bbox.left - 1 || x > bbox.left + bbox.width + 1) continue;
      const colour = style(mark.kind === "live" ? "--good" : mark.kind === "chosen" ? "--accent" : "--muted");
      ctx.strokeStyle = colour;
      ctx.lineWidth = ratio;
      ctx.setLineDash(mark.kind === "past" ? [3 * ratio, 4 * ratio] : []);
      ctx.beginPath(); ctx.moveTo(x, bbox.top); ctx.lineTo(x, bbox.top + bbox.height); ctx.stroke();
      const width = ctx.measureText(mark.label).width + 8 * ratio;
      const left = Math.min(x + 3 * ratio, bbox.left + bbox.width - width);
      let row = 0;
      while (taken.some((each) => each.row === row && left < each.end && each.start < left + width)) row += 1;
      taken.push({ row, start: left, end: left + width });
      const top = bbox.top + (4 + row * 16) * ratio;
      ctx.fillStyle = style("--surface"); ctx.globalAlpha = 0.85; ctx.fillRect(left, top - ratio, width, 14 * ratio);
      ctx.globalAlpha = 1; ctx.fillStyle = colour; ctx.fillText(mark.label, left + 4 * ratio, top);
    }
    const { min, max } = plot.scales.x;
    if (data.best && data.best.x >= min && data.best.x <= max) {
      const x = plot.valToPos(data.best.x, "x", true), y = plot.valToPos(data.best.y, "y", true);
      ctx.setLineDash([]);
      ctx.beginPath(); ctx.arc(x, y, 6 * ratio, 0, 2 * Math.PI);
      ctx.fillStyle = style("--good"); ctx.fill();
      ctx.lineWidth = 2 * ratio; ctx.strokeStyle = style("--surface"); ctx.stroke();
    }
    ctx.restore();
  };

  // Of a logarithmic axis: beginning at a round number, as that is written beside it.
  const around = (low, high) => { const unit = 10 ** Math.floor(Math.log10(low / 1.1)); return [Math.floor(low / 1.1 / unit) * unit, high * 1.1]; };

  const options = (data, place, isLog, refs, zoomed) => {
    const ink = style("--muted"), line = style("--line"), font = `12px ${style("--sans")}`;
    const axis = { stroke: ink, font, grid: { stroke: line, width: 1 }, ticks: { stroke: line, width: 1 } };
    const most = Math.max(...data.curves.map((curve) => curve.x.length)), many = most > 60;
    return {
      width: place.clientWidth,
      height: Math.max(260, Math.min(420, place.clientWidth * 0.42)),
      scales: { x: { time: false }, y: { distr: isLog ? 3 : 1, range: isLog ? (_, low, high) => around(low, high) : (_, low, high) => { const pad = (high - low || Math.abs(high) || 1) * 0.08; return [low - pad, high + pad]; } } },
      axes: [{ ...axis, space: (_, __, low, high) => 20 + 7 * Math.round(high).toLocaleString("en").length, values: (_, ticks) => ticks.map((each) => (each == null ? "" : each.toLocaleString("en"))) }, { ...axis, size: 64, values: (_, ticks) => ticks.map((each) => (each == null ? "" : short(each))) }],
      cursor: { drag: { x: true, y: false }, focus: { prox: most > 3000 ? -1 : 24 }, points: { size: 8 } },
      focus: { alpha: 0.35 },  // draws all anew whenever another curve is nearest: not for long ones
      legend: { markers: { width: 3 } },
      series: [
        { label: data.axis, value: (_, value) => (value == null ? "–" : value.toLocaleString("en")) },
        ...data.curves.map((curve, at) => ({
          label: curve.name, stroke: style(colours[at % colours.length]), width: 2, spanGaps: true, points: { show: !many, size: 6 },
          dash: at >= colours.length ? [6, 4] : undefined,
          value: (plot, value, series, index) => (value == null ? "–" : `${short(value)} (${refs[series - 1].get(plot.data[0][index]) ?? ""})`),
        })),
      ],
      hooks: { draw: [marks(data)], setScale: [(plot, key) => { if (key === "x") zoomed(plot); }] },
    };
  };

  const start = (place) => {
    const card = place.parentElement;
    const data = JSON.parse(card.querySelector("[data-curves-data]").textContent);
    data.curves = data.curves.map(unique);
    const table = joined(data.curves), refs = refsOf(data.curves);
    const log = card.querySelector("[data-curves-log]"), reset = card.querySelector("[data-curves-reset]");
    const lowest = Math.min(...data.curves.map((curve) => curve.y.reduce((low, each) => Math.min(low, each), Infinity)));
    if (!(lowest > 0)) log.parentElement.hidden = true;
    const ends = [table[0][0], table[0][table[0].length - 1]];
    let plot;
    const zoomed = (of) => { reset.hidden = of.scales.x.min <= ends[0] && of.scales.x.max >= ends[1]; };
    const draw = () => {
      plot?.destroy();
      place.textContent = "";
      plot = new uPlot(options(data, place, log.checked, refs, zoomed), table, place);
    };
    draw();
    // A press without a drag on a curve that is near opens the checkpoint under the cursor.
    let from = 0;
    place.addEventListener("mousedown", (event) => { from = event.clientX; });
    place.addEventListener("click", (event) => {
      if (!event.target.closest(".u-over") || Math.abs(event.clientX - from) > 3 || event.detail > 1) return;
      const index = plot.cursor.idx;
      if (index == null) return;
      const near = data.curves.map((_, at) => ({ at, value: table[at + 1][index] })).filter((each) => each.value != null)
        .map((each) => ({ ...each, far: Math.abs(plot.valToPos(each.value, "y") - plot.cursor.top) })).sort((one, other) => one.far - other.far)[0];
      if (!near || near.far > 14) return;
      const ref = refs[near.at].get(table[0][index]);
      setTimeout(() => { if (!doubled) location.assign(`/checkpoints/${encodeURI(data.curves[near.at].adapter)}@${ref}`); doubled = false; }, 260);
    });
    let doubled = false;
    place.addEventListener("dblclick", () => { doubled = true; setTimeout(() => { doubled = false; }, 300); });
    reset.addEventListener("click", () => plot.setScale("x", { min: ends[0], max: ends[1] }));
    log.addEventListener("change", draw);
    document.addEventListener("theme", draw);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
    let width = place.clientWidth;
    new ResizeObserver(() => { if (place.clientWidth !== width) { width = place.clientWidth; draw(); } }).observe(place);
  };

  document.querySelectorAll("[data-curves]").forEach(start);

  // Pickers apply at once.
  const picks = document.getElementById("picks");
  picks?.addEventListener("change", () => picks.requestSubmit());
  picks?.querySelector("button")?.setAttribute("hidden", "");
})();
