// What lies under a pointer or a finger: the row of the nearest mark of a picture, so that thin lines and small points can be hit.

const REACH = { touch: 30, mouse: 16 }; // pixels

function rowAt(view, place, event) {
  const box = place.getBoundingClientRect();
  const [left, top] = view.origin();
  const { left: padLeft, top: padTop } = view.padding();
  const point = [event.clientX - box.left - left - padLeft, event.clientY - box.top - top - padTop];
  let nearest = { distance: REACH[event.pointerType] ?? REACH.mouse, row: null };
  const consider = (distance, row) => { if (distance <= nearest.distance) nearest = { distance, row }; };
  const visit = (mark, x, y) => {
    if (mark.marktype === "group") {
      if (mark.role === "legend" || mark.role === "axis") return;
      for (const group of mark.items) for (const inner of group.items) visit(inner, x + (group.x || 0), y + (group.y || 0));
    } else if (mark.role === "mark") {
      const distance = DISTANCES[mark.marktype];
      if (distance) distance(mark.items, point[0] - x, point[1] - y, consider);
    }
  };
  visit(view.scenegraph().root, 0, 0);
  return nearest.row;
}

/** By type of mark: call `consider` with the distance and the row of each item that stands for a row. */
const DISTANCES = {
  rect(items, x, y, consider) {
    for (const { bounds, datum } of items) {
      if (datum.value !== undefined && x >= bounds.x1 && x <= bounds.x2 && y >= bounds.y1 && y <= bounds.y2) consider(0, datum);
    }
  },
  symbol(items, x, y, consider) {
    for (const item of items) consider(Math.hypot(item.x - x, item.y - y), item.datum);
  },
  line(items, x, y, consider) {
    if (items[0]?.datum.series !== undefined) return; // along the depth, points are chosen
    items.forEach((end, i) => {
      const start = items[Math.max(0, i - 1)];
      const [dx, dy] = [end.x - start.x, end.y - start.y];
      const along = Math.min(1, Math.max(0, ((x - start.x) * dx + (y - start.y) * dy) / (dx * dx + dy * dy || 1)));
      consider(Math.hypot(start.x + along * dx - x, start.y + along * dy - y), (along < 0.5 ? start : end).datum);
    });
  },
};
